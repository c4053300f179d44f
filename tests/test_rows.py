"""Columns of prompt rows on their way from files to heads, and heads that judge some rows alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epd_ray.actors.beforehand import panel_of
from epd_ray.config.loading import load_config
from epd_ray.config.sections import PromptsConfig
from epd_ray.errors import ConfigError, PromptError, RewardError
from epd_ray.evaluation.suites.evaluate import evaluate_suite
from epd_ray.evaluation.suites.settings import Request
from epd_ray.prompts.files import read_prompts, read_rows
from epd_ray.prompts.panel import Panel
from epd_ray.prompts.splits import PromptSplits, load_prompts
from epd_ray.rdpo.session import rdpo_config
from epd_ray.rewards.mixing import Mixer
from epd_ray.rewards.needs import needs_of
from epd_ray.rewards.routes import Routes
from epd_ray.rewards.scoring import Scorer
from epd_ray.runs.evaluate import evaluate
from epd_ray.runs.origin import origin_of
from epd_ray.runs.saved import read_splits
from epd_ray.runs.train import train
from epd_ray.solvers import Solver
from epd_ray.storage.rollouts import read_rollouts, rollout_table, write_rollouts
from tests.conftest import SIMULATED, TINY
from tests.fakes import LevelHead, Quiet
from tests.test_scoring import Head
from tests.test_store import row

READS = Panel({"clip": 1.0, "ocr": 2.0}, {"ocr": ("text_in_it", "size")})
ROUTED = Panel({"clip": 1.0, "ocr": 2.0}, {"ocr": ("level",)}, "judges")


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_text(content)
    return path


# -- files ------------------------------------------------------------------------------------------------------------

TEXT = [{"text_in_it": "GO", "size": "3"}, {"text_in_it": "a, b", "size": "0.5"}]
TYPED = [{"text_in_it": "GO", "size": 3}, {"text_in_it": ["a", "b"], "size": {"h": 0.5}}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'prompt,Text_in_it,other,size\np,GO,x,3\nq,"a, b",,0.5\n', TEXT),
        ("a.tsv", "size\tcaption\ttext_in_it\n3\tp\tGO\n0.5\tq\ta, b\n", TEXT),
        (
            "a.jsonl",
            '{"prompt": "p", "text_in_it": "GO", "size": 3, "other": NaN}\n'
            '{"prompt": "q", "SIZE": {"h": 0.5}, "text_in_it": ["a", "b"]}\n',
            TYPED,
        ),
        (
            "a.json",
            '[{"prompt": "p", "text_in_it": "GO", "size": 3}, {"prompt": "q", "size": {"h": 0.5}, "text_in_it": '
            '["a", "b"]}]',
            TYPED,
        ),
        (
            "a.parquet",
            {"prompt": ["p", "q"], "text_in_it": ["GO", "x"], "size": [3, 4], "other": [b"x", b"y"]},
            [{"text_in_it": "GO", "size": 3}, {"text_in_it": "x", "size": 4}],
        ),
        (
            "a.parquet",
            {"prompt": ["p", "q"], "text_in_it": [["GO"], ["a", "b"]], "size": [{"h": 1.5}, {"h": 2.0}]},
            [{"text_in_it": ["GO"], "size": {"h": 1.5}}, {"text_in_it": ["a", "b"], "size": {"h": 2.0}}],
        ),
    ],
)
def test_files_keep_the_columns_that_heads_read(tmp_path: Path, name: str, content: Any, expected: Any) -> None:
    path = write(tmp_path, name, content)
    found = read_rows(path, READS)
    assert found.texts == read_prompts(path) == ["p", "q"]
    assert found.rows == dict(zip(["p", "q"], expected, strict=True))
    assert read_rows(path, Panel({"clip": 1.0})).rows == {}
    assert json.loads(json.dumps(found.rows)) == found.rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            "prompt,size,text_in_it\np,3,GO\nq,3,\n",
            "line 3: no column 'text_in_it', which .* 'ocr' needs: fill",
        ),
        ("a.csv", "prompt,size\np,3\n", "line 2: no column 'text_in_it', which the reward head 'ocr' needs"),
        ("a.tsv", "prompt\ttext_in_it\tsize\np\tGO\t \n", "line 2: no column 'size'"),
        ("a.txt", "p\nq\n", "line 1: no column 'text_in_it', .* let prompts.heads name its heads"),
        ("a.jsonl", '{"prompt": "p", "text_in_it": null, "size": 1}\n', "line 1: no column 'text_in_it'"),
        ("a.json", '["p"]', "entry 1: no column 'text_in_it'"),
        (
            "a.parquet",
            {"prompt": ["p", "q"], "text_in_it": ["a", "b"], "size": [1.0, float("nan")]},
            "row 2: no column 'size'",
        ),
        ("a.parquet", {"prompt": ["p"], "text_in_it": [b"x"], "size": [1]}, r"row 1: 'text_in_it' is b'x' \(bytes\)"),
        ("a.jsonl", '{"prompt": "p", "text_in_it": "x", "size": 1e999}\n', r"line 1: 'size' is inf \(float\)"),
        ("a.jsonl", '{"prompt": "p", "text_in_it": "\\ud800", "size": 1}\n', "line 1: 'text_in_it' is"),
        ("a.jsonl", '{"prompt": "p", "text_in_it": {"a": 1, "a": 2}, "size": 1}\n', "has the key 'a' twice"),
        ("a.csv", "prompt,size,Size,text_in_it\np,1,2,x\n", "columns 'size' and 'Size'"),
        (
            "a.csv",
            "prompt,size,text_in_it\np,1,x\nq,1,x\np,2,x\n",
            "line 4: the prompt 'p' stands in line 2 too, with another 'size'",
        ),
    ],
)
def test_a_row_that_lacks_what_a_head_needs_is_named(tmp_path: Path, name: str, content: Any, said: str) -> None:
    with pytest.raises(PromptError, match=said) as caught:
        read_rows(write(tmp_path, name, content), READS)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


# -- which heads judge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (None, {"clip": 1.0, "ocr": 2.0}),
        ("ocr", {"ocr": 2.0}),
        ("clip:3, ocr", {"clip": 3.0, "ocr": 2.0}),
        (" ocr:0 ;clip:.5 ", {"ocr": 0.0, "clip": 0.5}),
        (["clip"], {"clip": 1.0}),
        ({"clip": 0.25, "ocr": None}, {"clip": 0.25, "ocr": 2.0}),
    ],
)
def test_a_cell_names_the_heads_of_a_row(cell: Any, expected: dict[str, float]) -> None:
    cells = {} if cell is None else {"judges": cell}
    assert ROUTED.judges(cells) == expected
    assert Panel({"clip": 1.0}).judges(cells) == {"clip": 1.0}


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"judges": "clp"}, "'judges' names the head 'clp'; did you mean 'clip'?"),
        ({"judges": "clip clip"}, "the head 'clip' twice"),
        ({"judges": "clip:-1"}, "the weight '-1' of the head 'clip' is no number of at least 0"),
        ({"judges": {"clip": True}}, "the weight True of the head 'clip'"),
        ({"judges": "clip:nan"}, "the weight 'nan'"),
        ({"judges": 3}, "are neither text, nor a list of names"),
        ({"judges": []}, "'judges' names no head: name one"),
        ({"judges": "clip:0"}, "names no head with a weight above 0, so there is no reward"),
        ({"judges": "ocr"}, "no column 'level', which the reward head 'ocr' needs: .* name other heads in 'judges'"),
    ],
)
def test_a_row_that_nothing_rewards_is_refused(cells: Any, said: str) -> None:
    with pytest.raises(PromptError, match=f"^here: .*{said.replace('?', '.')}"):
        ROUTED.require(cells, "here")


def test_a_row_needs_only_what_its_own_heads_read() -> None:
    ROUTED.require({"judges": "clip"}, "here")
    assert ROUTED.given("ocr", {"judges": "clip", "level": 1}) is None
    assert ROUTED.given("ocr", {"judges": "ocr", "level": 1, "more": 2}) == {"level": 1}
    assert ROUTED.given("clip", {"judges": "clip"}) == {} and ROUTED.columns == ("judges", "level")


ROWS = "prompt,judges,level\n" + "".join(f"p{i},{'clip' if i % 2 else 'ocr:3'},{i}\n" for i in range(8))


def test_splits_have_the_rows_of_their_prompts_and_are_kept(tmp_path: Path) -> None:
    wanted = PromptsConfig(train=str(write(tmp_path, "a.csv", ROWS)), validation=2, test=2, heads="judges")
    found = load_prompts(wanted, 0, ROUTED)
    assert (found.train, found.validation, found.test) == (["p0", "p1", "p2", "p3"], ["p4", "p5"], ["p6", "p7"])
    assert found.rows["p6"] == {"judges": "ocr:3", "level": "6"} and len(found.rows) == 8
    (tmp_path / "prompts.json").write_text(json.dumps(asdict(found)))
    assert read_splits(tmp_path / "prompts.json") == found
    (tmp_path / "prompts.json").write_text('{"train": ["a"], "validation": ["b"], "test": ["c"]}')  # of an older run
    assert read_splits(tmp_path / "prompts.json") == PromptSplits(["a"], ["b"], ["c"])
    config = load_config(None)
    assert "prompts.json:rows" not in origin_of(config, PromptSplits(["a"], ["b"], ["c"])).settings
    other = PromptSplits(found.train, found.validation, found.test, {**found.rows, "p0": {"judges": "ocr", "level": 9}})
    assert origin_of(config, found).settings != origin_of(config, other).settings


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"train": "shapes"}, "prompts.train=shapes, whose captions have no columns: no column 'level'"),
        ({"train": "builtin"}, "prompts.train=builtin, .*: no column 'level'"),
        ({"validation": 1}, "validation prompts of .*a.csv: the reward head 'clip' judges no row"),
    ],
)
def test_splits_whose_rows_do_not_fit_the_heads(tmp_path: Path, update: dict[str, Any], said: str) -> None:
    path = str(write(tmp_path, "a.csv", ROWS.replace("p5,clip", "p5,ocr")))
    wanted = PromptsConfig(**{"train": path, "validation": 2, "test": 2, "heads": "judges", **update})
    with pytest.raises(PromptError, match=said):
        load_prompts(wanted, 0, ROUTED)


def test_the_column_of_heads_has_to_be_there(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,judge,level\np,clip,1\n")
    with pytest.raises(PromptError, match=r"a.csv has no column 'judges', which prompts.heads names"):
        read_rows(path, ROUTED)
    with pytest.raises(ConfigError, match="has no columns"):
        load_config(None, [f"prompts={{train: {path.with_suffix('.txt')}, heads: judges}}"])


def test_built_in_prompts_have_their_category() -> None:
    found = load_prompts(PromptsConfig(train="builtin", num_train=12), 0, Panel({"x": 1.0}, {"x": ("category",)}))
    assert {found.rows[prompt]["category"] for prompt in found.train} >= {"counts", "relations"}


# -- heads ------------------------------------------------------------------------------------------------------------

IMAGES = np.stack([np.full((3, 2, 2), 50 * i, np.uint8) for i in range(3)])
IDS = ["a", "b", "c"]


def test_what_a_head_reads_is_known_before_it_is_built() -> None:
    assert needs_of("tests.fakes:LevelHead", {}) == ("level",)
    assert needs_of("simulated", {}) == needs_of("clip", {}) == () == needs_of("no_such_module:Head", {})
    assert needs_of("http", {"url": "http://x", "columns": ["a", "b"]}) == ("a", "b") and needs_of("http", {}) == ()
    config = load_config(None, ["rewards={a: {head: 'tests.fakes:LevelHead', weight: 2}, simulated: {}}"])
    assert panel_of(config) == Panel({"a": 2.0, "simulated": 1.0}, {"a": ("level",), "simulated": ()})


def test_a_head_is_given_the_rows_that_it_judges_and_no_others() -> None:
    head = LevelHead()
    found = Scorer("x", head).score(IMAGES, ["p", "q", "r"], IDS, [{"level": 1}, None, {"level": "2.5"}])
    assert np.array_equal(found, np.array([1, np.nan, 2.5], np.float32), equal_nan=True)
    assert head.seen == [(["p", "r"], [{"level": 1}, {"level": "2.5"}])]
    plain = Head(lambda images: images.mean((1, 2, 3)))  # a head without interest in rows need not know of them
    found = Scorer("x", plain).score(IMAGES, ["p", "q", "r"], IDS, [None, {}, {}])
    assert np.isnan(found[0]) and found[1:].tolist() == pytest.approx([50 / 255, 100 / 255])
    assert plain.seen[0][1] == ["q", "r"]
    assert (
        np.isnan(Scorer("x", head).score(IMAGES[:0], ["p", "q"], IDS[:2], [None, None])).all() and len(head.seen) == 1
    )


@pytest.mark.parametrize("rows", [None, [{"level": 1}, {}, {"level": 2}]])
def test_a_batch_without_a_column_is_an_error(rows: Any) -> None:
    with pytest.raises(RewardError, match="'x': needs the column 'level', which a row lacks"):
        Scorer("x", LevelHead()).score(IMAGES, ["p", "q", "r"], IDS, rows)


# -- rewards ----------------------------------------------------------------------------------------------------------

PROMPTS = ["both", "clip", "ocr"]
ROUTES = Routes(ROUTED, {"clip": {"judges": "clip:5"}, "ocr": {"judges": "ocr", "level": 1}, "both": {"level": 2}})
NAN = float("nan")


def scores(clip: list[float], ocr: list[float]) -> dict[str, np.ndarray]:
    return {"clip": np.array(clip, np.float32), "ocr": np.array(ocr, np.float32)}


def test_the_reward_is_the_weighted_mean_over_the_heads_that_judge() -> None:
    mixer = Mixer(ROUTED.weights, {"clip": "clip", "ocr": "ocr"}, "none", ROUTES)
    found = mixer.train(scores([0.5, 0.25, NAN], [2.0, NAN, 3.0]), PROMPTS)
    assert found.tolist() == pytest.approx([(0.5 + 2 * 2.0) / 3, 0.25, 3.0])
    assert mixer.held_out(scores([0.5, 0.25, NAN], [2.0, NAN, 3.0]), PROMPTS).tolist() == found.tolist()


def test_a_weight_of_a_row_takes_the_place_of_that_of_the_head() -> None:
    routes = Routes(ROUTED, {"p": {"judges": "clip:3 ocr:1", "level": 1}})
    found = Mixer(ROUTED.weights, {}, "none", routes).train(scores([1.0], [5.0]), ["p"])
    assert found.tolist() == pytest.approx([(3 * 1.0 + 5.0) / 4])


def test_z_scores_count_the_judged_alone() -> None:
    mixer = Mixer(ROUTED.weights, {}, "zscore", ROUTES)
    mixer.observe([scores([1.0, 3.0], [NAN, NAN]), scores([NAN], [7.0])])
    assert mixer.train(scores([1.0, 3.0], [NAN, NAN]), ["clip", "clip"]).tolist() == pytest.approx([-1.0, 1.0])
    assert mixer.state()["seen"]["ocr"].tolist() == [7.0]
    first = mixer.held_out(scores([1.0, 3.0], [NAN, NAN]), ["clip", "clip"])
    later = mixer.held_out(scores([2.0], [4.0]), ["both"])  # the first picture that ocr judges is its own measure
    assert first.tolist() == pytest.approx([-1.0, 1.0]) and later.tolist() == [0.0]


def test_rollouts_have_nulls_where_a_head_does_not_judge(tmp_path: Path) -> None:
    rows = [row(i, prompt=f"p{i}", rewards={"clip": 0.5, "ocr": value}) for i, value in enumerate([None, 2.0])]
    path = write_rollouts(tmp_path, 3, rollout_table(rows))
    assert read_rollouts(path)["rewards"].to_pylist() == [{"clip": 0.5, "ocr": None}, {"clip": 0.5, "ocr": 2.0}]
    for wrong in ({"clip": None, "ocr": None}, {"clip": 0.5, "ocr": NAN}):
        with pytest.raises(RewardError):
            rollout_table([{**rows[0], "rewards": wrong}])


# -- whole runs -------------------------------------------------------------------------------------------------------

HEADS = "rewards={sim: {head: simulated, replicas: 0}, level: {head: 'tests.fakes:LevelHead', replicas: 0, weight: 3}}"
LEVELS = {f"prompt {i}": {"judges": "sim"} if i % 2 else {"judges": "level:2 sim", "level": i} for i in range(16)}


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [0, 1])
def test_an_iteration_is_rewarded_by_the_heads_of_each_prompt(small_ray: None, replicas: int) -> None:
    settings = [HEADS, f"rewards.level.replicas={replicas}", "prompts={train: any.csv, heads: judges}"]
    algo = rdpo_config(load_config(None, [*SIMULATED, *settings]), list(LEVELS), rows=LEVELS).build_algo()
    try:
        algo.train()
        for rollout in algo.last.rollouts:
            level, sim = LEVELS[rollout.request.prompt].get("level"), rollout.rewards["sim"]
            assert sim is not None and rollout.rewards["level"] == level
            assert rollout.reward == pytest.approx(
                sim if level is None else (2 * float(str(level)) + sim) / 3, rel=1e-5
            )
        levels = [r.rewards["level"] for r in algo.last.rollouts if r.rewards["level"] is not None]
        assert algo.last.metrics["reward/level"] == pytest.approx(np.mean(levels))
    finally:
        algo.stop()


def test_prompts_that_a_head_cannot_judge_are_refused_before_anything_starts() -> None:
    config = load_config(None, [*SIMULATED, HEADS, "prompts={train: any.csv, heads: judges}"])
    rows = {**LEVELS, "prompt 4": {"judges": "level"}}
    with pytest.raises(PromptError, match="the prompt 'prompt 4': no column 'level', which the reward head"):
        rdpo_config(config, list(rows), rows=rows).validate()
    rdpo_config(config.model_copy(update={"rewards": {}}), list(rows)).validate()  # to distill, which judges nothing


@pytest.mark.slow
def test_a_run_and_its_evaluations_with_heads_that_judge_some_prompts(
    small_ray: None, tmp_path: Path, undrawn: None
) -> None:
    lines = [f"prompt {i},{'sim' if i % 2 else 'level:2 sim'},{i / 10}" for i in range(32)]
    table = write(tmp_path, "a.csv", "\n".join(["prompt,judges,level", *lines]))
    settings = [*TINY, HEADS, f"prompts={{train: {table}, heads: judges, validation: 8, test: 8}}"]
    train(load_config(None, settings), tmp_path / "run", Quiet())
    rollouts = pq.read_table(tmp_path / "run" / "rollouts").to_pylist()
    assert {r["prompt"] for r in rollouts if r["rewards"]["level"] is None} == {f"prompt {i}" for i in range(1, 16, 2)}
    assert all(r["rewards"]["level"] in (None, pytest.approx(int(r["prompt"].split()[1]) / 10)) for r in rollouts)
    for name in ("evaluation", "validation"):
        found = pq.read_table(tmp_path / "run" / f"{name}.parquet").to_pylist()
        assert {row["level"] is None for row in found} == {True, False}
        assert {int(row["prompt"].split()[1]) % 2 for row in found if row["level"] is None} == {1}
    means = json.loads((tmp_path / "run" / "evaluation.json").read_text())["solvers"][0]["metrics"]["level"]
    assert means["mean"] == pytest.approx(np.mean([2.4, 2.6, 2.8, 3.0]))
    assert Solver.from_pretrained(tmp_path / "run" / "solver").meta["rewards_after"]["level"] == pytest.approx(2.7)
    more = write(tmp_path, "more.csv", "prompt,judges,level\nx,sim,\ny,level,7\nz,sim level,9\n")
    lines = evaluate(tmp_path / "run", None, more, "test", Quiet())
    assert lines[-1].startswith("report: ")
    write(tmp_path, "more.csv", "prompt,judges,level\nx,sim,\ny,level,\n")
    with pytest.raises(PromptError, match=r"more.csv, line 3: no column 'level'"):
        evaluate(tmp_path / "run", None, more, "test", Quiet())
    out = tmp_path / "suite"
    write(tmp_path, "more.csv", "prompt,judges,level\nx,sim,\ny,level,7\nz,sim level,9\n")
    request = Request("prompts", out, (str(tmp_path / "run" / "solver"),), prompts=more)
    config = load_config(None, [*settings, "evaluation.baselines=[euler]"])
    evaluate_suite(config, request, Quiet())
    found = pq.read_table(out / "results.parquet").to_pylist()
    assert {(row["prompt"], row["level"], row["sim"] is None) for row in found} == {
        *(("x", None, False), ("y", 7.0, True), ("z", 9.0, False))
    }
