"""Whole runs on the simulated backbone: what they leave, how they stop, how they go on."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer import Exit

from epd_ray.cli.common import ending
from epd_ray.config.loading import load_config
from epd_ray.errors import ConfigError, EpdRayError, ModelError, PromptError, RewardError, RunDirectoryError, TableError
from epd_ray.prompts.splits import PromptSplits
from epd_ray.rdpo import session
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.policy_window import PolicyWindow
from epd_ray.runs import evaluate as evaluate_module
from epd_ray.runs import train as train_module
from epd_ray.runs import trainer
from epd_ray.runs.describe import describe
from epd_ray.runs.evaluate import evaluate
from epd_ray.runs.report import write_report
from epd_ray.runs.sample import SampleOptions, sample
from epd_ray.runs.saved import saved_prompts
from epd_ray.runs.stage_one import given_solver
from epd_ray.runs.train import resume, train
from epd_ray.solvers import Solver, SolverTable
from epd_ray.storage.checkpoint import FORMAT, load_newest, save_best, save_checkpoint
from epd_ray.storage.places import place_of
from epd_ray.storage.rollouts import TIMINGS
from epd_ray.storage.run_directory import RunDirectory, package_versions, read_metrics
from tests.conftest import TINY
from tests.fakes import Quiet

pytestmark = pytest.mark.usefixtures("undrawn")


def table(path: Path) -> list[list[float]]:
    return Solver.from_pretrained(path).table.positions.tolist()


def test_run_leaves_everything(finished):
    out, lines = finished
    said = " ".join(lines)
    assert "EPD + RDPO (parallel NFE 6, 9 evaluations, 9 network passes) is" in said  # this model has no guidance
    assert "50 steps of DDIM / Euler" in said
    for name in ("config.yaml", "versions.json", "report.html", "evaluation.json", "evaluation.parquet"):
        assert (out / name).stat().st_size > 0, name
    metrics = read_metrics(out / "metrics.jsonl")
    assert [m["iteration"] for m in metrics] == list(range(7))
    assert all(m["time/total"] > m["time/iteration"] for m in metrics[1:])
    fine_tuning = json.loads((out / "stages.json").read_text())["fine-tuning"]
    assert 0.5 * fine_tuning < sum(m["time/total"] for m in metrics[1:]) < fine_tuning  # validations are in it
    assert len(list((out / "rollouts").glob("*.parquet"))) == 6
    rows = pq.read_table(out / "rollouts").to_pylist()
    assert len({r["rollout_id"] for r in rows}) == 6 * 32
    kept = [f"iteration-00000{i}.pt" for i in (2, 4, 6)]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["best.pt", *kept]
    meta = Solver.from_pretrained(out / "solver").meta
    assert meta["backbone"] == "simulated" and meta["guidance_scale"] == 7.0
    summary = json.loads((out / "evaluation.json").read_text())
    assert {s["key"] for s in summary["solvers"]} >= {
        "rdpo",
        "distilled",
        "euler-50",
        "euler_no_zero-6",
        "euler_no_zero-9",
    }
    assert summary["reference"] == "euler-50" and {d["solver"] for d in summary["differences"]} == {"rdpo"}
    assert {s["key"]: len(s["sigmas"]) for s in summary["solvers"]}["euler-50"] == 51
    assert (out / "images" / "contact_sheet.png").stat().st_size > 0
    assert load_config(out / "config.yaml") == load_config(None, TINY)


def test_interrupted_run_resumes_to_the_same_end(finished, tmp_path):
    out, _ = finished
    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        train(load_config(None, TINY), again, Quiet(interrupt_after=3))
    write_report(again)  # a stopped run can be looked at
    resume(again, Quiet())
    assert table(again / "solver") == table(out / "solver")
    assert [path.name for path in sorted((again / "rollouts").iterdir())] == [
        f"iteration-{i:06d}.parquet" for i in range(1, 7)
    ]
    assert rollouts(again) == rollouts(out)
    assert [m["iteration"] for m in read_metrics(again / "metrics.jsonl")] == list(range(7))


@pytest.mark.parametrize(
    "where", ["sample_scored", *(pytest.param(w, marks=pytest.mark.slow) for w in ("write_rollouts", "take"))]
)
def test_interrupt_inside_an_iteration_loses_nothing(finished, tmp_path, monkeypatch, where):
    out, _ = finished
    owner = {"sample_scored": RDPO, "write_rollouts": trainer, "take": PolicyWindow}[where]
    original, calls = getattr(owner, where), []

    def interrupt_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, where, interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(None, TINY), tmp_path / "again", Quiet())
    resume(tmp_path / "again", Quiet())
    assert table(tmp_path / "again" / "solver") == table(out / "solver")
    assert rollouts(tmp_path / "again") == rollouts(out)
    assert read_validation(tmp_path / "again") == read_validation(out)


def rollouts(run: Path) -> pa.Table:
    """All rollouts, without what differs from one time to the next."""
    return pq.read_table(run / "rollouts").drop_columns(TIMINGS)


def read_validation(run: Path) -> list[float | None]:
    return [m.get("validation/reward") for m in read_metrics(run / "metrics.jsonl")]


def test_model_that_cannot_be_opened_leaves_nothing(small_ray, tmp_path):
    broken = [*TINY, "backbone.family=auto", "backbone.model=/nowhere/at/all"]
    with pytest.raises(ModelError, match="no directory"):
        train(load_config(None, broken), tmp_path / "run", Quiet())
    assert not (tmp_path / "run").exists()


def test_rollouts_say_what_was_drawn_and_how_long_it_took(finished):
    out, _ = finished
    for row in pq.read_table(out / "rollouts").to_pylist()[::20]:
        segments, weights, scales = np.split(np.array(row["action"]).reshape(3, 9), 3, axis=1)
        positions = np.reshape(row["positions"], (3, 3))
        assert (positions[:, 0] == 0).all()  # the start point
        np.testing.assert_allclose(positions[:, 1:], segments.cumsum(1)[:, :2], atol=1e-5)
        np.testing.assert_allclose(np.reshape(row["weights"], (3, 3)), weights, atol=1e-5)
        np.testing.assert_allclose(np.reshape(row["scale_dir"], (3, 3)), scales, rtol=1e-6)
        assert row["scale_time"] is row["image"] is None
        assert row["generate_seconds"] > 0 and row["score_seconds"] > 0


def test_pictures_and_scales_on_request(small_ray, tmp_path):
    more = ["store.images=true", "rdpo.iterations=1", "rdpo.scale_time=true"]
    more += ["solver.points=2", "solver.start_point=false"]
    train(load_config(None, [*TINY, *more]), tmp_path / "run", Quiet())
    rows = pq.read_table(tmp_path / "run" / "rollouts").to_pylist()
    assert {Image.open(io.BytesIO(row["image"]), formats=["PNG"]).size for row in rows} == {(8, 8)}
    for row in rows:
        scales = np.array(row["action"]).reshape(3, 9)[:, 5:]  # [N, A]: segments 3, weights 2, two scales of 2
        np.testing.assert_allclose(np.reshape(row["scale_dir"], (3, 2)), scales[:, :2], rtol=1e-6)
        times = np.reshape(row["scale_time"], (3, 2))
        assert (times <= scales[:, 2:] * (1 + 1e-6)).all()  # lowered where a flow model has never been


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def unfinished(run: Path) -> Path:
    """The run as it was before it wrote the file that marks a finished one."""
    (run / "stages.json").unlink()
    return run


def into_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "a bit flipped": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_text("hello"),
    "a directory": into_a_directory,
}


@pytest.fixture
def checkpoints(finished, tmp_path):
    return Path(shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_falls_back(checkpoints, caplog, damage):
    DAMAGE[damage](checkpoints / "iteration-000006.pt")
    state = load_newest(checkpoints)
    assert state is not None and state["algorithm"]["rdpo"]["iteration"] == state["iteration"] == 4
    assert [r.message.partition(" (")[0] for r in caplog.records] == ["checkpoint iteration-000006.pt is damaged"]
    assert load_newest(checkpoints / "nothing") is None


def test_every_flipped_bit_is_seen(checkpoints):
    path = checkpoints / "iteration-000006.pt"
    data, good = path.read_bytes(), pickle_free(load_newest(checkpoints))
    for place in range(0, len(data), max(1, len(data) // 75)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        state = load_newest(checkpoints)
        assert state["iteration"] == 4 or pickle_free(state) == good, (
            place
        )  # bytes between the records count for nothing


def pickle_free(state) -> str:
    return json.dumps(state, default=lambda array: array.tolist(), sort_keys=True)


def test_the_best_checkpoint_stays_and_is_the_last_resort(finished, checkpoints, caplog):
    out, _ = finished
    best = [m["iteration"] for m in read_metrics(out / "metrics.jsonl") if m.get("validation/best")][-1]
    for path in checkpoints.glob("iteration-*.pt"):
        path.write_bytes(b"")
    state = load_newest(checkpoints)
    assert state["iteration"] == state["best"]["iteration"] == best and len(caplog.records) == 3
    (checkpoints / "best.pt").write_bytes(b"")
    with pytest.raises(RunDirectoryError, match=r"\b4 checkpoints in "):
        load_newest(checkpoints)


def test_keep_counts_the_newest_and_not_the_best(tmp_path):
    save_best(tmp_path, 1, {"x": 1})
    for iteration in range(1, 6):
        save_checkpoint(tmp_path, iteration, {"x": np.float32(iteration)}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "iteration-000004.pt", "iteration-000005.pt"]


def test_a_checkpoint_outlives_those_of_a_damaged_future(tmp_path):
    for iteration in (2, 8, 9):
        save_checkpoint(tmp_path, iteration, {"x": 1}, keep=9)
    save_checkpoint(tmp_path, 4, {"x": 1}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000002.pt", "iteration-000004.pt"]


def test_a_checkpoint_is_written_once(finished, tmp_path, monkeypatch):
    written, original = [], trainer.save_checkpoint

    def note(folder, iteration, *rest):
        written.append(iteration)
        return original(folder, iteration, *rest)

    monkeypatch.setattr(trainer, "save_checkpoint", note)
    train(load_config(None, [*TINY, "rdpo.iterations=2"]), tmp_path / "new", Quiet())
    resume(unfinished(tmp_path / "new"), Quiet())
    assert written == [0, 2]


def test_a_run_begun_anew_keeps_no_rollouts(own_run):
    out = unfinished(own_run)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(KeyboardInterrupt):
        resume(out, Quiet(interrupt_after=1))
    assert [path.name for path in (out / "rollouts").iterdir()] == ["iteration-000001.parquet"]


def test_a_checkpoint_of_a_newer_format_is_no_damage(checkpoints):
    save_checkpoint(checkpoints, 7, {"format": FORMAT + 1}, keep=9)
    said = rf"newer epd_ray \(checkpoint format {FORMAT + 1}, .* up to {FORMAT}\): update epd_ray"
    with pytest.raises(RunDirectoryError, match=said):
        load_newest(checkpoints)
    save_checkpoint(checkpoints, 7, {"format": 1}, keep=9)
    with pytest.raises(RunDirectoryError, match=r"checkpoint format 1,"):
        load_newest(checkpoints)


def test_resume_with_other_versions_says_so(own_run, caplog, monkeypatch):
    out = unfinished(own_run)
    monkeypatch.setattr("epd_ray.runs.standing.package_versions", lambda: {**package_versions(), "torch": "9.9"})
    resume(out, Quiet())
    (said,) = [r.message for r in caplog.records]
    assert said.startswith(
        f"the run {out} began with other package versions (torch {torch.__version__} before, 9.9 now): "
    )


@pytest.mark.slow
def test_a_crash_before_the_checkpoint_leaves_every_rollout_once(finished, tmp_path, monkeypatch):
    out, _ = finished
    original = trainer.save_checkpoint

    def crash(folder, iteration, *rest):
        if iteration == 4:
            raise ZeroDivisionError
        return original(folder, iteration, *rest)

    monkeypatch.setattr(trainer, "save_checkpoint", crash)
    again = tmp_path / "again"
    with pytest.raises(ZeroDivisionError):
        train(load_config(None, TINY), again, Quiet())
    assert len(list((again / "rollouts").iterdir())) == 4 and load_newest(again / "checkpoints")["iteration"] == 2
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        resume(again, Quiet(interrupt_after=1))  # restored to 2, stopped after 3
    ids = pq.read_table(again / "rollouts", columns=["rollout_id"]).column(0).to_pylist()
    assert len(ids) == len(set(ids)) == 3 * 32
    resume(again, Quiet())
    assert rollouts(again) == rollouts(out) and table(again / "solver") == table(out / "solver")


def test_a_second_run_on_the_same_directory_is_refused(own_run):
    out = own_run
    with place_of(out).claimed():
        before = sorted(out.iterdir())
        for start in (resume, lambda path, observer: train(load_config(None, TINY), path, observer, again=True)):
            with pytest.raises(RunDirectoryError, match=rf"process {os.getpid()} ") as said:
                start(out, Quiet())
            assert "\n" not in str(said.value)
        assert sorted(out.iterdir()) == before
        assert evaluate(out, 2, None, "test", Quiet())  # it writes nothing that the run does
    resume(out, Quiet())


@pytest.mark.slow
def test_retry_begins_continues_and_ends(finished, tmp_path):
    out, _ = finished
    config, again = load_config(None, TINY), tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        train(config, again, Quiet(interrupt_after=3), again=True)
    lines = train(config, again, Quiet(), again=True)
    assert rollouts(again) == rollouts(out)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*") if path.is_file() and path.name != ".lock"}
    quiet = Quiet()
    assert train(config, again, quiet, again=True) == lines and quiet.stages == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(RunDirectoryError, match=r"again .*rdpo.lr was 0.001, now 0.003"):
        train(load_config(None, [*TINY, "rdpo.lr=3e-3"]), again, Quiet(), again=True)


def test_a_run_of_a_newer_version_is_refused_first(own_run):
    out = own_run
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(
        re.sub(r"^format: \d+$", "format: 99", text, flags=re.MULTILINE) + "quantum: {bits: 3}\n"
    )
    with pytest.raises(ConfigError, match=r"config\.yaml.*format 99, ") as said:
        resume(out, Quiet())
    assert len(said.value.problems) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MiB, where this may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    "pages", [pytest.param(0, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.nightly)]
)
def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_after(finished, small_disk, pages):
    out, _ = finished
    run, filler = small_disk / "run", small_disk / "filler"
    with pytest.raises(KeyboardInterrupt):
        train(load_config(None, TINY), run, Quiet(interrupt_after=2))
    room = os.statvfs(small_disk)
    filler.write_bytes(bytes((room.f_bavail - pages) * room.f_frsize))
    with pytest.raises(EpdRayError, match="No space left on device") as said:
        resume(run, Quiet())
    assert str(run) in str(said.value) and "\n" not in str(said.value)
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    for path in run.glob("rollouts/*"):
        pq.read_table(path)
    assert load_newest(run / "checkpoints")["iteration"] >= 2
    filler.unlink()
    resume(run, Quiet())
    assert rollouts(run) == rollouts(out) and table(run / "solver") == table(out / "solver")
    assert [m["iteration"] for m in read_metrics(run / "metrics.jsonl")] == list(range(7))


OUTGROWS = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from epd_ray.storage.checkpoint import save_best, save_checkpoint
from epd_ray.errors import RunDirectoryError
from epd_ray.storage.rollouts import rollout_table, write_rollouts
from epd_ray.storage.run_directory import MetricsLog, RunDirectory, write_text
from tests.test_store import row

rows = rollout_table([row(i) for i in range(200)])
writers = {
    "rollouts": lambda folder: write_rollouts(folder, 3, rows),
    "checkpoint": lambda folder: save_checkpoint(folder, 1, {"x": np.zeros(2000)}, keep=1),
    "best": lambda folder: save_best(folder, 1, {"x": np.zeros(2000)}),
    "metrics": lambda folder: MetricsLog(RunDirectory(folder)).write(
        {"iteration": 1} | {f"a{i}": i for i in range(1000)}
    ),
    "text": lambda folder: write_text(folder / "a.txt", "a" * 9999),
}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
for name, write in writers.items():
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    try:
        write(folder)
        print(name, "was written")
    except RunDirectoryError as error:
        print(name, error)
"""


def test_files_that_outgrow_the_disk_are_refused_whole(tmp_path):
    """As on a full disk, by a limit on the size of files."""
    done = subprocess.run([sys.executable, "-c", OUTGROWS, str(tmp_path)], capture_output=True, text=True, check=True)
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(said) == ["rollouts", "checkpoint", "best", "metrics", "text"]
    for name, error in said.items():
        assert str(tmp_path / name) in error and "File too large" in error, error
    left = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size and "events" not in path.name
    ]
    assert left == []


def test_evaluate_tunes_the_rivals_on_the_validation_prompts(own_run, tmp_path):
    text = (own_run / "config.yaml").read_text()
    changed = text.replace("tune: false", "tune: true").replace("tune_images: 128", "tune_images: 24")
    assert changed != text
    (own_run / "config.yaml").write_text(changed)
    quiet = Quiet()
    evaluate(own_run, 3, None, "test", quiet)
    assert quiet.stages[:2] == ["starting actors", "tuning rivals"]
    record = json.loads((own_run / "evaluations" / "test-3" / "evaluation.json").read_text())
    tuned = [row for row in record["solvers"] if row["tuned"]]
    assert {row["kind"] for row in tuned} == {"euler", "euler_no_zero", "dpmpp2m"}
    assert all(0 < row["tuned"]["images"] <= 24 for row in tuned) and record["reference"] in {r["key"] for r in tuned}
    assert {"euler_no_zero-6", "dpmpp2m-6"} <= {row["key"] for row in record["solvers"]}  # as they come, beside
    assert all(row["guidance_scale"] is not None and row["network_passes"] for row in record["solvers"])
    overlap = tmp_path / "overlap.txt"
    overlap.write_text("\n".join([*saved_prompts(RunDirectory(own_run)).validation[:2], "another"]))
    with pytest.raises(ConfigError, match="2 validation prompts are test prompts too"):
        evaluate(own_run, None, overlap, "test", Quiet())
    quiet = Quiet()
    evaluate(own_run, 3, None, "validation", quiet)
    assert "tuning rivals" not in quiet.stages


def test_overlapping_splits_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "load_prompts", lambda *_: PromptSplits(["a"], ["b", "c"], ["c"]))
    with pytest.raises(ConfigError, match=r"1 validation prompts are test prompts too, such as 'c'"):
        train(load_config(None, [*TINY, "evaluation.tune=true"]), tmp_path / "run", Quiet())
    assert not (tmp_path / "run").exists()


def test_evaluate_on_other_prompts(own_run, tmp_path):
    out = own_run
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na house\n")
    lines = evaluate(out, None, prompts, "test", Quiet())
    assert any("DDIM / Euler" in line for line in lines)
    (own,) = (out / "evaluations").glob("file-prompts-*-3")
    assert json.loads((own / "evaluation.json").read_text())["prompts"] == 3
    assert (own / "report.html").stat().st_size > 0
    assert json.loads((out / "evaluation.json").read_text())["prompts"] == 8  # the run's own result stays
    prompts.write_text("a cat\na dog\na horse\n")
    other = tmp_path / ".prompts.txt"
    other.write_text("a cat\na dog\na mouse\n")
    for file in (prompts, other):
        evaluate(out, None, file, "test", Quiet())
    assert len(list((out / "evaluations").glob("file-prompts-*-3"))) == 3
    with pytest.raises(PromptError, match="4 prompts asked, 3 there"):
        evaluate(out, 4, prompts, "test", Quiet())


def test_an_evaluation_that_stops_leaves_the_one_before(own_run, monkeypatch):
    out = own_run
    evaluate(out, 2, None, "test", Quiet())
    before = (out / "evaluations" / "test-2" / "report.html").read_text()
    assert "test-2" in before and ".new" not in before

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "comparison", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(out, 2, None, "test", Quiet())
    assert (out / "evaluations" / "test-2" / "report.html").read_text() == before
    assert not list((out / "evaluations").glob(".*.new"))


def test_an_evaluation_outlives_its_report(own_run, monkeypatch):
    def failed(path):
        raise RunDirectoryError("no report")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_module, "write_report", failed)
        with pytest.raises(RunDirectoryError, match="no report"):
            evaluate(own_run, 3, None, "test", Quiet())
    there = own_run / "evaluations" / "test-3"
    assert json.loads((there / "evaluation.json").read_text())["prompts"] == 3
    assert write_report(there).is_file()


@pytest.fixture
def earlier(own_run):
    """A run with an evaluation that is about to be replaced."""
    run = RunDirectory.open(own_run)
    final = run.path / "evaluations" / "test-9"
    final.mkdir(parents=True)
    (final / "evaluation.json").write_text("earlier")
    return run, final


def replaced(run, final):
    with evaluate_module.draft(run, final) as target:
        (target.path / "evaluation.json").write_text("new")


def test_an_evaluation_takes_the_place_of_the_one_before(earlier):
    run, final = earlier
    replaced(run, final)
    assert (final / "evaluation.json").read_text() == "new" and (final / "solver" / "solver.json").is_file()
    assert not list(final.parent.glob(".test-9.*"))


def test_an_evaluation_is_kept_where_the_one_before_cannot_be_removed(earlier, monkeypatch):
    run, final = earlier
    aside, remove = final.with_name(".test-9.old"), shutil.rmtree
    with monkeypatch.context() as patch:  # as on a network disk, where an open file stays in its directory
        patch.setattr(shutil, "rmtree", lambda path, **how: None if path in (final, aside) else remove(path, **how))
        replaced(run, final)
        assert (final / "evaluation.json").read_text() == "new"
        with pytest.raises(RunDirectoryError, match=r"\.test-9\.old"):
            replaced(run, final)
    replaced(run, final)
    assert not list(final.parent.glob(".test-9.*"))


def test_an_evaluation_that_cannot_move_in_leaves_the_one_before(earlier, monkeypatch):
    run, final = earlier
    rename = Path.rename

    def refuse(path, target):
        if path.parent.name == ".test-9.new":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        replaced(run, final)
    assert (final / "evaluation.json").read_text() == "earlier"
    assert not list(final.parent.glob(".test-9.*"))


def test_an_evaluation_that_was_moved_aside_comes_back(earlier):
    """As after a kill between the two moves."""
    run, final = earlier
    final.rename(final.with_name(".test-9.old"))
    with pytest.raises(KeyboardInterrupt), evaluate_module.draft(run, final):
        raise KeyboardInterrupt
    assert (final / "evaluation.json").read_text() == "earlier"
    assert not list(final.parent.glob(".test-9.*"))


def test_occupied_directory_is_refused_before_anything_starts(finished):
    out, _ = finished
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(RunDirectoryError):
        train(load_config(None, TINY), out, Quiet())
    assert sorted(p.name for p in out.iterdir()) == before


def test_start_table_of_another_shape_is_refused(finished, tmp_path):
    out, _ = finished
    config = load_config(None, [*TINY, f"distill.table={out / 'solver'}", "solver.points=4"])
    with pytest.raises(TableError, match="3 intervals of 3 points"):
        train(config, tmp_path / "new", Quiet())
    assert not (tmp_path / "new").exists()


def test_start_table_of_another_family_is_refused(finished, tmp_path):
    out, _ = finished
    config = load_config(None, [*TINY, f"distill.table={out / 'solver'}", "backbone.family=gaussian"])
    with pytest.raises(TableError, match="family simulated"):
        train(config, tmp_path / "new", Quiet())
    assert not (tmp_path / "new").exists()


def test_saved_solver_draws_again(finished, tmp_path):
    out, _ = finished
    picture = sample(str(out / "solver"), ["a", "b"], 0, tmp_path / "new" / "two.png", SampleOptions())
    assert Image.open(picture, formats=["PNG"]).size == (16, 8)


def test_a_solver_used_otherwise_than_trained_says_so(finished, tmp_path, caplog):
    out, _ = finished
    sample(str(out / "solver"), ["a"], 0, tmp_path / "same.png", SampleOptions())
    assert not caplog.records
    sample(str(out / "solver"), ["a"], 0, tmp_path / "other.png", SampleOptions(guidance_scale=3.0))
    (record,) = caplog.records
    assert "was trained at guidance_scale 7.0, the pictures are made at 3.0" in record.message


def test_a_solver_for_another_family_draws_nothing(finished, tmp_path):
    out, _ = finished
    shutil.copytree(out / "solver", tmp_path / "solver")
    file = tmp_path / "solver" / "solver.json"
    file.write_text(file.read_text().replace('"backbone": "simulated"', '"backbone": "sd3"'))
    with pytest.raises(TableError, match=r"sd3, .*simulated"):
        sample(str(tmp_path / "solver"), ["a"], 0, tmp_path / "none.png", SampleOptions())
    assert not (tmp_path / "none.png").exists()


def test_wrong_reward_stops_the_run_and_leaves_it_readable(small_ray, tmp_path):
    config = load_config(None, [*TINY, "rewards={bad: {head: 'tests.fakes:NanHead', replicas: 0}}"])
    with pytest.raises(RewardError, match="rollouts "):
        train(config, tmp_path / "run", Quiet())
    assert load_config(tmp_path / "run" / "config.yaml") == config
    late = load_config(None, [*TINY, "rewards={bad: {head: 'tests.fakes:LateNanHead'}}"])
    with pytest.raises(RewardError, match="rollouts "):
        train(late, tmp_path / "late", Quiet())
    assert load_config(tmp_path / "late" / "config.yaml") == late
    assert "report" in write_report(tmp_path / "late").name


def test_describe_says_what_and_how_long():
    what, how_long = describe(load_config(None, ["evaluation.tune=false"]))
    assert "45 iterations, 1,440 images" in what
    assert how_long == "It takes 47,232 network passes, about 3 minutes with 2 rollout actors on CPU cores."
    assert describe(load_config(None))[1].startswith("It takes 63,872 network passes, about 4 minutes")
    for settings, said in (
        (["rdpo.iterations=0", "distill.enabled=false", "prompts.test=8"], "about 1 minute with"),
        (["rdpo.iterations=4000"], "about 85 minutes with"),
        (["rdpo.iterations=9000"], "about 3 hours with"),
    ):
        assert said in describe(load_config(None, ["evaluation.tune=false", *settings]))[1]
    assert describe(load_config(None, ["cluster.rollout_gpus=0.5"])) == (
        what,
        "The progress line of the first iteration will show how long the run takes.",
    )


@pytest.mark.parametrize(
    "stop",
    [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_stop_signals_leave_a_checkpoint_and_an_exit_code(tmp_path, stop):
    out = tmp_path / "run"
    overrides = [*TINY, "rdpo.iterations=500", "backbone.options={latency: 0.01}"]
    command = [sys.executable, "-m", "epd_ray.cli", "train", "--out", str(out), *overrides]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("rollouts/*.parquet")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        assert list(out.glob("rollouts/*.parquet"))
        process.send_signal(stop)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert f"epd-ray train --resume {out}" in errors and "Traceback" not in errors
    done = load_newest(out / "checkpoints")["iteration"]
    assert len(list(out.glob("rollouts/*.parquet"))) >= done >= 1

    # Both what was stopped and a run that never was go on to the same end.
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("iterations: 500", f"iterations: {done + 4}"))
    accepted = ["--accept", "rdpo.iterations"]
    subprocess.run([*command[:4], "--resume", str(out), *accepted], check=True, env={**os.environ, "PYTHONPATH": "."})
    undisturbed = [*command[:5], str(tmp_path / "whole"), *overrides, f"rdpo.iterations={done + 4}"]
    subprocess.run(undisturbed, check=True, env={**os.environ, "PYTHONPATH": "."})
    assert rollouts(out) == rollouts(tmp_path / "whole") and table(out / "solver") == table(
        tmp_path / "whole" / "solver"
    )


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "free some space, or use"), (errno.EACCES, "change its permissions, or use")]
)
def test_what_a_disk_refuses_is_one_line(capsys, number, fix):
    with pytest.raises(Exit), ending():
        raise OSError(number, os.strerror(number), "/x")
    assert capsys.readouterr().err == f"error: /x: {os.strerror(number)} ({fix} another place)\n"


def test_prompts_that_the_model_cuts_are_counted_once(caplog):
    class Algo:
        def truncated(self, prompts):
            return sum(len(prompt) > 10 for prompt in prompts)

    session.warn_of_long_prompts(Algo(), ["a" * 20, "short", "b" * 20, "c"])
    assert [r.message for r in caplog.records] == ["2 of 4 prompts are longer than the model reads: their ends are cut"]
    session.warn_of_long_prompts(Algo(), ["a"])
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("gpus", "overrides", "forgotten"),
    [
        (8, [], ["cluster.rollout_gpus", "rewards.hpsv2.num_gpus"]),
        (0, [], []),
        (8, ["cluster.rollout_gpus=1"], ["rewards.hpsv2.num_gpus"]),
        (8, ["cluster.rollout_gpus=0.6", "rewards.hpsv2.num_gpus=0.4"], []),
    ],
)
def test_gpus_that_nobody_asks_for_are_mentioned(monkeypatch, caplog, gpus, overrides, forgotten):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0, "GPU": float(gpus)})
    session._warn_of_idle_gpus(load_config(None, ["backbone.model=owner/name", *overrides]))
    session._warn_of_idle_gpus(load_config(None))  # the embedded model needs none
    assert [r.getMessage().rpartition(": set ")[2] for r in caplog.records] == [", ".join(forgotten)] * bool(forgotten)


@pytest.mark.parametrize(("key", "option"), [("afs", "solver.afs=false"), ("order", "solver.order=1")])
def test_a_start_with_other_options_is_refused(tmp_path, key, option):
    made = {"afs": True} if key == "afs" else {"order": 2}
    table = SolverTable(torch.tensor([[0.5]]), torch.ones(1, 1))
    Solver(table, torch.tensor([1.0, 0.1]), "flow", **made).save_pretrained(tmp_path)
    options = ["solver.intervals=1", "solver.points=1", f"distill.table={tmp_path}", "solver.start_point=false", option]
    with pytest.raises(TableError, match=f"{key} .*solver.{key}"):
        given_solver(load_config(None, options))


def test_a_published_table_has_no_start_point():
    options = ["distill.table=sd3-512-distilled", "solver.intervals=10", "solver.points=2"]
    with pytest.raises(TableError, match=r"start_point False, .*True.*solver\.start_point"):
        given_solver(load_config(None, options))
    assert given_solver(load_config(None, [*options, "solver.start_point=false"])) is not None


def saved(folder, **meta):
    table = SolverTable(torch.tensor([[0.5]]), torch.ones(1, 1))
    Solver(table, torch.tensor([1.0, 0.1]), "flow", meta=meta).save_pretrained(folder)
    return str(folder)


def test_a_solver_file_does_not_choose_what_code_runs(tmp_path):
    meta = {"backbone": "x", "model_id": "x", "registry": "os:mkdir", "options": {"path": str(tmp_path / "made")}}
    with pytest.raises(TableError, match=r"'os:mkdir'.*--family os:mkdir"):
        sample(saved(tmp_path / "evil", **meta), ["a"], 0, tmp_path / "a.png", SampleOptions())
    assert not (tmp_path / "made").exists()
    mine = {"backbone": "simulated", "registry": "tests.fakes:TableBackbone", "options": {"size": 8}}
    family = SampleOptions(family="tests.fakes:TableBackbone")
    assert sample(saved(tmp_path / "mine", **mine), ["a"], 0, tmp_path / "a.png", family).is_file()


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({}, "meta.backbone: Field required"),
        ({"backbone": "sd3", "guidance_scale": "high"}, "meta.guidance_scale: Input should be a valid number"),
        ({"backbone": "sd3", "resolution": "big"}, "meta.resolution: Input should be a valid integer"),
        ({"backbone": "sd3", "options": [1]}, "meta.options: Input should be a valid dictionary"),
        ({"backbone": "sd3"}, "does not say which model it is for: pass --model"),
    ],
)
def test_what_a_solver_file_says_is_checked(tmp_path, meta, said):
    with pytest.raises(TableError, match=said):
        sample(saved(tmp_path / "solver", **meta), ["a"], 0, tmp_path / "a.png", SampleOptions())


def test_options_and_files_that_cannot_be(tmp_path):
    solver = saved(tmp_path / "solver", backbone="simulated", registry="simulated", guidance_scale=None)
    assert sample(solver, ["a"], 0, tmp_path / "a.png", SampleOptions()).is_file()
    with pytest.raises(ConfigError, match="--device, --dtype or --resolution"):
        sample(solver, ["a"], 0, tmp_path / "a.png", SampleOptions(resolution=64))
    for out in (tmp_path / "a.xyz", tmp_path):
        with pytest.raises(ConfigError, match=r"\.png"):
            sample(solver, ["a"], 0, out, SampleOptions())


def test_a_start_from_another_schedule_says_so(small_ray, tmp_path, caplog):
    table = SolverTable(torch.tensor([[0.4], [0.5], [0.6]]), torch.ones(3, 1))
    Solver(table, torch.tensor([1.0, 0.7, 0.4, 0.1]), "flow", meta={"guidance_scale": 3.0}).save_pretrained(
        tmp_path / "s"
    )
    options = [
        *TINY,
        "solver.points=1",
        "solver.start_point=false",
        f"distill.table={tmp_path / 's'}",
        "rdpo.iterations=1",
    ]
    train(load_config(None, options), tmp_path / "run", Quiet())
    said = [r.message for r in caplog.records if "was" in r.message]
    assert any(
        "was made for the sigmas 1 ... 0.1, but this run uses the sigmas of its model: 1 ... " in message
        for message in said
    )
    assert any("was trained at guidance_scale 3.0, the pictures are made at 7.0" in message for message in said)
