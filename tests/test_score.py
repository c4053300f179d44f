"""Scoring what is there already: rows with their errors, parts that are added to, and the pipeline on a small Ray."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epd_ray.actors.reward_pool import RewardSpec
from epd_ray.bench.cases import CASES
from epd_ray.cli.score import _settings
from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import ConfigError, EpdRayError, PlacementError, RewardError, RunDirectoryError
from epd_ray.prompts.panel import Panel
from epd_ray.rewards import HEADS
from epd_ray.rewards.scoring import Scorer
from epd_ray.score import output as score_output
from epd_ray.score import pipeline as module
from epd_ray.score.inputs import read_index
from epd_ray.score.output import SUMMARY, ScoreDirectory, score_schema
from epd_ray.score.pipeline import ScoreRequest, TooManyErrors, score, scored
from epd_ray.score.rows import PIXELS, score_rows
from epd_ray.storage.parquet import write_table
from epd_ray.storage.pictures import FORMATS
from tests.fakes import LevelHead, Quiet
from tests.test_score_input import folder_of, parquet_of, png

SIM = {"sim": {"head": "simulated", "backend": "native", "options": {}}}


def config_of(*overrides: str) -> RunConfig:
    return load_config(None, ["rewards={moody: {head: 'tests.fakes:Moody'}}", *overrides])


def rows_of(out: Path) -> dict[str, dict[str, object]]:
    rows = pq.read_table(out).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row.pop("id"): row for row in rows}


# -- rows -------------------------------------------------------------------------------------------------------------


def pixel_rows(*rows: tuple[str, str | None, tuple[int, int] | None]) -> pa.Table:
    """Rows by prompt, error and size; their brightness is 10, 20 and so on."""
    return pa.Table.from_pylist(
        [
            {
                "id": str(i),
                "prompt": prompt,
                "error": error,
                "height": None if size is None else size[0],
                "width": None if size is None else size[1],
                "pixels": None if size is None else bytes([10 * i]) * (3 * size[0] * size[1]),
            }
            for i, (prompt, error, size) in enumerate(rows, start=1)
        ],
        schema=PIXELS,
    )


def test_rows_of_one_size_are_a_batch_and_none_is_mixed_up():
    calls = []

    def score(images, prompts, ids):
        calls.append((images.shape, ids))
        return images.mean(axis=(1, 2, 3)).astype(np.float32)

    table = pixel_rows(("a", None, (4, 8)), ("b", None, (8, 4)), ("c", "bad", None), ("d", None, (4, 8)))
    found = score_rows(table, "x", score)
    assert calls == [((2, 3, 4, 8), ["1", "4"]), ((1, 3, 8, 4), ["2"])]
    assert found["score:x"].to_pylist() == [10, 20, None, 40]
    assert found["error"].to_pylist() == [None, None, "bad", None]


def test_pixels_reach_the_head_as_they_were():
    picture = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    row = {"id": "a", "prompt": "p", "height": 2, "width": 4, "pixels": picture.tobytes()}
    seen = []
    score_rows(pa.Table.from_pylist([row], schema=PIXELS), "x", lambda i, p, n: seen.append(i) or np.zeros(1))
    np.testing.assert_array_equal(seen[0][0].transpose(1, 2, 0), picture)


def test_only_the_row_that_a_head_refuses_carries_the_error():
    def picky(images, prompts, ids):
        if "bad" in prompts:
            raise RewardError("x", "gave nan", ids)
        return np.full(len(ids), 0.5, np.float32)

    table = pixel_rows(*((p, None, (2, 2)) for p in ("a", "bad", "c")))
    once = score_rows(table, "x", picky)
    assert once["score:x"].to_pylist() == [0.5, None, 0.5]
    assert once["error"].to_pylist() == [None, "x: gave nan", None]
    twice = score_rows(once, "y", picky)
    assert twice["error"].to_pylist() == [None, "x: gave nan; y: gave nan", None]


def test_a_head_scores_the_rows_that_it_judges_and_reads_their_columns():
    head = LevelHead()
    table = pixel_rows(*((p, None, (2, 2)) for p in ("a", "b", "c")))
    cells = ['{"level": 5}', '{"judges": "other"}', '{"level": "7", "judges": "x"}']
    table = table.set_column(2, "columns", pa.array(cells))
    panel = Panel({"x": 1.0, "other": 1.0}, {"x": ("level",)}, "judges")
    found = score_rows(table, "x", Scorer("x", head).score, panel)
    assert found["score:x"].to_pylist() == [5.0, None, 7.0] and found["error"].to_pylist() == [None] * 3
    found = score_rows(
        table.set_column(2, "columns", pa.array(["{}", *cells[1:]])), "x", Scorer("x", head).score, panel
    )
    assert found["score:x"].to_pylist() == [None, None, 7.0]
    assert found["error"].to_pylist()[0].startswith("x: needs the column 'level'")


# -- directories ------------------------------------------------------------------------------------------------------


def scored_rows(**errors: str | None) -> pa.Table:
    """Rows as they come out of the pipeline: id -> error."""
    return pa.table(
        {
            "id": list(errors),
            "prompt": [f"prompt {name}" for name in errors],
            "error": pa.array(errors.values(), pa.string()),
            "score:sim": pa.array([None if e else 0.5 for e in errors.values()], pa.float32()),
        }
    )


def index_of(*ids: str) -> pa.Table:
    return pa.table({"id": list(ids), "prompt": [f"prompt {name}" for name in ids]})


def test_a_directory_knows_what_it_lacks(tmp_path):
    out = ScoreDirectory(tmp_path / "new" / "scores", SIM)
    out.add([scored_rows(a=None, b="bad")], {"sim": "model 1"})
    out.add([scored_rows(c="bad")], {})
    again = ScoreDirectory(tmp_path / "new" / "scores", SIM)
    todo = again.missing(index_of("a", "b", "c", "d"))
    assert todo["id"].to_pylist() == ["b", "c", "d"]
    (again.path / ".part-000003.parquet.tmp").touch()  # of a killed run
    again.drop(todo)
    assert sorted(p.name for p in again.path.iterdir()) == ["part-000001.parquet"]
    assert list(rows_of(again.path)) == ["a"]
    schema = pq.read_schema(again.parts[0])
    facts = {"sim": {**SIM["sim"], "model_id": "model 1"}}
    assert schema.equals(score_schema(facts), check_metadata=True)
    assert schema.metadata[b"schema_version"] == b"1"


def test_a_changed_prompt_is_scored_again_and_a_stranger_is_refused(tmp_path):
    out = ScoreDirectory(tmp_path, SIM)
    out.add([scored_rows(a=None, b=None)], {})
    changed = index_of("a", "b").set_column(1, "prompt", pa.array(["prompt a", "another"]))
    assert out.missing(changed)["id"].to_pylist() == ["b"]
    with pytest.raises(RunDirectoryError, match=r"'b'.*--out"):
        out.missing(index_of("a"))


def test_changed_columns_are_scored_again(tmp_path):
    def rows(**cells):
        table = scored_rows(**dict.fromkeys(cells))
        return table.append_column("columns", pa.array(cells.values(), pa.string()))

    out = ScoreDirectory(tmp_path, SIM, with_columns=True)
    out.add([rows(a='{"level": 1}', b='{"level": 2}')], {})
    again = ScoreDirectory(tmp_path, SIM, with_columns=True)
    assert again.missing(rows(a='{"level": 1}', b='{"level": 3}'))["id"].to_pylist() == ["b"]
    assert rows_of(tmp_path)["a"]["columns"] == '{"level": 1}'
    with pytest.raises(RunDirectoryError, match="holds no scores of this command, whose columns are others"):
        ScoreDirectory(tmp_path, SIM)


def test_directories_that_are_not_ours_are_refused(tmp_path):
    ScoreDirectory(tmp_path / "mine", SIM).add([scored_rows(a=None)], {})
    other = {"sim": {**SIM["sim"], "options": {"target": 0.1}}}
    for heads, said in [
        ({**SIM, "clip": {}}, "holds scores by sim, not by clip, sim: name another --out"),
        (other, "with options {}, now it is {'target': 0.1}: name another --out"),
    ]:
        with pytest.raises(RunDirectoryError, match=said):
            ScoreDirectory(tmp_path / "mine", heads)
    (tmp_path / "file").touch()
    for name, said in [("file", "is a file"), ("", "holds other things")]:
        with pytest.raises(RunDirectoryError, match=said):
            ScoreDirectory(tmp_path / name, SIM)
    (tmp_path / "mine" / "part-000007.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunDirectoryError, match=r"part-000007\.parquet"):
        ScoreDirectory(tmp_path / "mine", SIM)
    parquet_of(tmp_path / "mine" / "part-000007.parquet", {"id": ["a"]})
    with pytest.raises(RunDirectoryError, match="holds no scores of this command"):
        ScoreDirectory(tmp_path / "mine", SIM)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.replace_schema_metadata({"heads": "[" * 5000}), "it is nested too deeply"),
        (lambda t: t.replace_schema_metadata({"heads": "5"}), "holds no scores of this command"),
        (lambda t: t.replace_schema_metadata({"heads": '{"sim": 5}'}), "holds no scores of this command"),
        (lambda t: t.drop_columns("error"), "whose columns are others"),
        (lambda t: t.set_column(0, "id", pa.array(range(len(t)))), "whose columns are others"),
    ],
)
def test_damaged_scores_are_one_line(tmp_path, change, said):
    ScoreDirectory(tmp_path, SIM).add([scored_rows(a=None)], {})
    [part] = tmp_path.iterdir()
    write_table(part, change(pq.read_table(part)))
    with pytest.raises(RunDirectoryError, match=rf"part-000001\.parquet.*{said}.*name another --out") as caught:
        ScoreDirectory(tmp_path, SIM)
    assert "\n" not in str(caught.value)


def test_a_damaged_page_of_scores_is_found(tmp_path):
    out = ScoreDirectory(tmp_path / "seed=3", SIM)  # which is no column of a partitioned table
    out.add([scored_rows(some_picture=None)], {})
    assert out.totals().rows == 1 and len(out.missing(index_of("some_picture"))) == 0
    [part] = out.path.iterdir()
    data = bytearray(part.read_bytes())
    data[4 + 40] ^= 1  # within the first page
    part.write_bytes(data)
    with pytest.raises(RunDirectoryError, match=r"part-000001\.parquet cannot be read: .*scored again"):
        out.missing(index_of("some_picture"))


def test_two_writers_do_not_overwrite_each_other(tmp_path):
    one, two = ScoreDirectory(tmp_path, SIM), ScoreDirectory(tmp_path, SIM)
    one.add([scored_rows(a=None)], {})
    with pytest.raises(RunDirectoryError, match="another process writes scores"):
        two.add([scored_rows(b=None)], {})


def test_totals(tmp_path):
    out = ScoreDirectory(tmp_path, SIM)
    assert out.totals().mean == {"sim": None}
    values = np.random.default_rng(0).normal(size=6).astype(np.float32)
    for part in (values[:2], values[2:]):
        table = scored_rows(**{f"r{value}": None for value in part})
        out.add([table.set_column(3, "score:sim", pa.array(part))], {})
    out.add([scored_rows(bad="x")], {})
    totals = out.totals()
    assert (totals.rows, totals.errors) == (7, 1)
    assert totals.mean["sim"] == pytest.approx(values.mean())
    assert totals.std["sim"] == pytest.approx(values.std())


def test_a_file_that_the_disk_refuses_leaves_nothing_half_written(tmp_path):
    out = ScoreDirectory(tmp_path, SIM)
    out.add([scored_rows(a=None)], {})
    many = scored_rows(**{f"{os.urandom(32).hex()}": None for _ in range(2000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunDirectoryError, match=r"part-000002\.parquet"):
            out.add([many], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["part-000001.parquet"]
    out.add([many], {})
    assert len(rows_of(tmp_path)) == 2001


# -- the command's configuration --------------------------------------------------------------------------------------


def test_heads_by_name_and_by_configuration(tmp_path):
    def heads(*arguments):
        return {name: (r.head, r.options, r.num_gpus) for name, r in _settings(*arguments).rewards.items()}

    both = {"clip": ("clip", {}, 1.0), "hpsv2": ("hpsv2.1", {}, 0.0)}
    assert heads("clip, hpsv2.1,hpsv2", None, ["rewards.clip.num_gpus=1"], None) == both
    own = "rewards={mine: {head: 'a:B'}, clip: {options: {model: shapes-clip}}}"
    assert list(heads(None, None, [own], None)) == ["mine", "clip"]
    assert heads("clip", None, [own], None) == {"clip": ("clip", {"model": "shapes-clip"}, 0.0)}
    (tmp_path / "run.yaml").write_text("rewards: {pick: {head: pickscore}, clip: {}}\n")
    assert heads("pick", tmp_path / "run.yaml", [], None) == {"pick": ("pickscore", {}, 0.0)}
    assert _settings("clip", None, [], "10.0.0.1:6379").cluster.address == "10.0.0.1:6379"


def test_a_row_whose_picture_is_too_long_says_so_and_the_others_are_scored():
    head = Scorer("clip", HEADS.build("clip", {"model": "shapes-clip"}))
    table = score_rows(pixel_rows(("a", None, (8, 8)), ("b", None, (1, 300)), ("c", None, (4, 64))), "clip", head.score)
    scores, errors = table["score:clip"].to_pylist(), table["error"].to_pylist()
    assert [score is not None for score in scores] == [True, False, True]
    assert errors[0] is errors[2] is None and "clip: " in errors[1] and "1 x 300 pixels" in errors[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("clp", None, []), "unknown reward head 'clp'; did you mean 'clip'?"),
        ((None, None, []), "no heads: give --heads"),
        (("clip", None, ["rewards.clip.replicass=2"]), "did you mean 'replicas'"),
        (("clip", None, ["rewards.clip.replicas=-1"]), "rewards.clip.replicas: is -1"),
        (("clip", None, ["rewards={mine: {head: clip}}"]), "no head 'clip' in the configuration"),
    ],
)
def test_wrong_heads_are_named(arguments, said):
    with pytest.raises(EpdRayError, match=said.replace("?", r"\?")):
        _settings(*arguments, None)


def test_pictures_that_exist_are_scored_by_actors(tmp_path):
    config = _settings("clip", None, ["rewards.clip.replicas=0"], None)
    with pytest.raises(ConfigError, match=r"rewards\.clip\.replicas is 0"):
        score(ScoreRequest(str(tmp_path), tmp_path / "scores"), config, Quiet())


# -- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_source_with_bad_rows_is_scored_and_only_what_failed_again(small_ray, tmp_path):
    source = folder_of(tmp_path / "images", [f"{i}.png" for i in range(8)])
    (source / "1.txt").write_text("refuse")
    (source / "2.txt").write_text("nan")
    (source / "3.txt").write_text(" ")
    (source / "4.png").write_bytes(b"no picture")
    (source / "5.png").write_bytes(png(200, (16, 8)))
    out = tmp_path / "scores"
    request = ScoreRequest(str(source), out, batch_size=4, max_errors=0.5)
    lines = score(request, config_of("rewards.sim.head=simulated"), Quiet())
    assert lines[0].startswith("scored 8 rows in ") and lines[0].endswith(
        " images/s): 4 of 8 pictures scored, 4 failed"
    )
    rows = rows_of(out)
    assert {name: row["error"] for name, row in rows.items() if row["error"]} == {
        "1.png": "moody: failed with ValueError: no mood",
        "2.png": "moody: gave 1 values that are not finite",
        "3.png": "no prompt",
        "4.png": "picture cannot be decoded: no known image format, expected one of " + ", ".join(FORMATS),
    }
    assert rows["1.png"]["scores"]["moody"] is None and rows["1.png"]["scores"]["sim"] is not None
    assert rows["5.png"]["scores"]["moody"] == pytest.approx(200 / 255)
    assert rows["7.png"] == {
        "prompt": "prompt 7",
        "scores": {"moody": pytest.approx(70 / 255), "sim": pytest.approx(70 / 255 - 0.5)},
        "error": None,
    }
    facts = json.loads(pq.read_schema(next(out.glob("part-*"))).metadata[b"heads"])
    assert facts["moody"]["model_id"] == "moody-1" and facts["sim"]["head"] == "simulated"
    summary = json.loads((out / SUMMARY).read_text())
    assert (summary["rows"], summary["scored"], summary["errors"], summary["last_run"]["rows"]) == (8, 4, 4, 8)

    for name in ("1", "2", "3"):
        (source / f"{name}.txt").write_text("better now")
    score(request, config_of("rewards.sim.head=simulated"), Quiet())
    again = rows_of(out)
    assert [name for name, row in again.items() if row["error"]] == ["4.png"]
    assert {name: again[name] for name in ("0.png", "5.png", "7.png")} == {
        name: rows[name] for name in ("0.png", "5.png", "7.png")
    }
    summary = json.loads((out / SUMMARY).read_text())
    assert (summary["rows"], summary["scored"], summary["last_run"]["rows"]) == (8, 7, 4)


@pytest.mark.slow
def test_too_many_errors_end_it_and_what_was_scored_stays(small_ray, tmp_path):
    prompts = ["fine"] * 5 + ["refuse"] * 2
    file = parquet_of(tmp_path / "a.parquet", {"image": [png(i) for i in range(7)], "prompt": prompts})
    request = ScoreRequest(str(file), tmp_path / "scores", max_errors=0.2)
    with pytest.raises(TooManyErrors, match=r"^2 rows.* 1 .*a\.parquet:5: moody: .*ValueError"):
        score(request, config_of(), Quiet())
    assert sum(row["error"] is None for row in rows_of(tmp_path / "scores").values()) == 5


def test_missing_prompts_end_it_before_it_starts(tmp_path):
    file = parquet_of(tmp_path / "a.parquet", {"image": [png(0)] * 4, "prompt": ["fine", None, "", "fine"]})
    with pytest.raises(TooManyErrors, match="2 rows failed, at most 1 may"):
        score(ScoreRequest(str(file), tmp_path / "scores", max_errors=0.25), config_of(), Quiet())
    assert not (tmp_path / "scores").exists()


def test_a_head_that_cannot_be_built_is_named(small_ray, tmp_path):
    source = folder_of(tmp_path / "images", ["a.png"])
    request = ScoreRequest(str(source), tmp_path / "scores")
    with pytest.raises(EpdRayError, match="'/no/where'"):
        score(request, config_of("rewards={clip: {options: {model: /no/where}}}"), Quiet())
    assert not (tmp_path / "scores").exists()


def test_a_full_disk_is_named_and_earlier_parts_stay(small_ray, tmp_path, monkeypatch):
    file = parquet_of(tmp_path / "a.parquet", {"image": [png(0)] * 600, "prompt": ["x"] * 600}, row_group_size=100)
    real = score_output.pq.write_table
    written = []

    def full(table, path, **options):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(table, path, **options)

    monkeypatch.setattr(score_output.pq, "write_table", full)
    monkeypatch.setattr(module, "PART_ROWS", 1)
    with pytest.raises(RunDirectoryError, match=r"part-000002\.parquet.*No space left on device"):
        score(ScoreRequest(str(file), tmp_path / "scores"), config_of(), Quiet())
    assert [p.name for p in (tmp_path / "scores").iterdir()] == ["part-000001.parquet"]
    assert set(rows_of(tmp_path / "scores"))


def test_actors_that_leave_no_cpu_for_reading_are_refused(small_ray, tmp_path):
    index = read_index(str(folder_of(tmp_path, ["a.png"])))
    with pytest.raises(PlacementError, match=r"after 1 s .*reading: 1 x 1 CPU"):
        next(scored(index, {"sim": RewardSpec("simulated", num_cpus=os.cpu_count())}, 4, timeout_s=1))


@pytest.mark.slow
def test_a_head_in_an_environment_of_its_own(small_ray, tmp_path):
    index = read_index(str(folder_of(tmp_path, ["a.png", "b.png"])))
    spec = RewardSpec("imagereward", target="tests.fakes:Moody", python=sys.executable)
    (found,) = scored(index, {"moody": spec}, 4)
    assert sorted(found["score:moody"].to_pylist()) == pytest.approx([0, 10 / 255])
    assert found["model:moody"].to_pylist() == ["moody-1"] * 2


@pytest.mark.slow
def test_a_head_that_dies_over_every_batch_ends_it(small_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STILL_SECONDS", 15.0)
    index = read_index(str(folder_of(tmp_path, ["a.png"])))
    with pytest.raises(EpdRayError, match=r"\b15 s\b"):
        list(scored(index, {"dying": RewardSpec("tests.fakes:DyingHead")}, 4))


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)],
)
def test_ctrl_c_keeps_what_is_there_and_the_same_command_goes_on(tmp_path, number):
    rows = 800
    file = parquet_of(
        tmp_path / "a.parquet",
        {"image": [png(i % 200) for i in range(rows)], "prompt": ["x"] * rows},
        row_group_size=50,
    )
    out, said = tmp_path / "scores", tmp_path / "stderr"
    command = [sys.executable, "-m", "epd_ray.cli", "score", str(file), "--heads", "simulated", "--out", str(out)]
    slow = "rewards.simulated.options={latency: 0.5}"
    with said.open("w") as stderr:
        process = subprocess.Popen([*command, slow], stderr=stderr, start_new_session=True)
        end = time.monotonic() + 240
        while f"/{rows}, failed" not in said.read_text() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(timeout=120) == 130, said.read_text()
    assert f"stopped: what was scored is in {out}" in said.read_text()
    assert "Traceback" not in said.read_text()
    kept = len(rows_of(out))
    assert 0 < kept < rows
    done = subprocess.run(
        [*command, slow.replace("0.5", "0.5 ")], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"scored {rows - kept:,} rows" in done.stdout
    assert len(rows_of(out)) == rows


@pytest.mark.slow
def test_the_bench_compares_the_same_work():
    record = CASES["scoring"](images=1024, repeats=1).figures
    assert record["head_images_per_s"] > record["loop_images_per_s"] > 0  # the loop decodes too
    assert record["ratio"] == pytest.approx(record["actor_images_per_s"] / record["loop_images_per_s"])
    assert record["ratio_to_head"] == pytest.approx(record["actor_images_per_s"] / record["head_images_per_s"])
