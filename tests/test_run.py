"""Whole runs on the simulated backbone: what they leave, how they stop, how they go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from epd_ray import session, trainer
from epd_ray.checkpoint import load_newest
from epd_ray.config import load_config
from epd_ray.errors import ConfigError, ModelError, PromptError, RewardError, RunDirectoryError, TableError
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.report import write_report
from epd_ray.run import describe, evaluate, given_solver, resume, train
from epd_ray.sample import SampleOptions, sample
from epd_ray.solvers import Solver, SolverTable
from epd_ray.store import read_metrics
from tests.fakes import Quiet

TINY = [
    "backbone.family=simulated",
    "rewards={sim: {head: simulated, options: {target: 0.4}}}",
    "solver.intervals=3",
    "prompts.validation=8",
    "prompts.test=8",
    "prompts.num_train=16",
    "distill.prompts=8",
    "rdpo.iterations=6",
    "evaluation.every=2",
    "checkpoint.every=2",
    "cluster.rollout_actors=0",
    "cluster.learner_actors=0",
]


@pytest.fixture(scope="module")
def finished(small_ray, tmp_path_factory):  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp("runs") / "run"
    lines = train(load_config(None, TINY), out, Quiet())
    return out, lines


def table(path: Path) -> list[list[float]]:
    return Solver.from_pretrained(path).table.positions.tolist()


def test_run_leaves_everything(finished):
    out, lines = finished
    assert any("EPD + RDPO" in line for line in lines) and any("ours minus distilled" in line for line in lines)
    for name in ("config.yaml", "versions.json", "report.html", "evaluation.json", "evaluation.parquet"):
        assert (out / name).stat().st_size > 0, name
    assert [m["iteration"] for m in read_metrics(out / "metrics.jsonl")] == list(range(7))
    assert len(list((out / "rollouts").glob("*.parquet"))) == 6
    rows = pq.read_table(out / "rollouts").to_pylist()
    assert len({r["rollout_id"] for r in rows}) == 6 * 32
    assert len(list((out / "checkpoints").glob("*.pt"))) == 3
    meta = Solver.from_pretrained(out / "solver").meta
    assert meta["backbone"] == "simulated" and meta["guidance_scale"] == 7.0
    summary = json.loads((out / "evaluation.json").read_text())
    assert {s["key"] for s in summary["solvers"]} >= {"rdpo", "distilled", "euler-6", "euler-9", "heun-10"}
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
    for i in range(1, 7):
        name = f"rollouts/iteration-{i:06d}.parquet"
        assert pq.read_table(again / name) == pq.read_table(out / name)
    assert [m["iteration"] for m in read_metrics(again / "metrics.jsonl")] == list(range(7))


@pytest.mark.parametrize("where", ["sample_scored", "write_rollouts", "_remember"])
def test_interrupt_inside_an_iteration_loses_nothing(finished, tmp_path, monkeypatch, where):
    out, _ = finished
    owner = trainer if where == "write_rollouts" else RDPO
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
    assert pq.read_table(tmp_path / "again" / "rollouts") == pq.read_table(out / "rollouts")
    assert read_validation(tmp_path / "again") == read_validation(out)


def read_validation(run: Path) -> list[float | None]:
    return [m.get("validation/reward") for m in read_metrics(run / "metrics.jsonl")]


def test_model_that_cannot_be_opened_leaves_nothing(small_ray, tmp_path):
    broken = [*TINY, "backbone.family=auto", "backbone.model=/nowhere/at/all"]
    with pytest.raises(ModelError, match="no directory"):
        train(load_config(None, broken), tmp_path / "run", Quiet())
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoint_falls_back(finished, tmp_path, caplog):
    out, _ = finished
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for path in (out / "checkpoints").glob("*.pt"):
        (folder / path.name).write_bytes(path.read_bytes())
    newest = max(folder.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    state = load_newest(folder)
    assert state is not None and state["algorithm"]["rdpo"]["iteration"] == 4
    assert "damaged" in caplog.text
    assert load_newest(tmp_path / "nothing") is None


def test_evaluate_on_other_prompts(finished, tmp_path):
    out, _ = finished
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na house\n")
    lines = evaluate(out, None, prompts, "test", Quiet())
    assert any("DDIM / Euler" in line for line in lines)
    own = out / "evaluations" / "prompts-3"
    assert json.loads((own / "evaluation.json").read_text())["prompts"] == 3
    assert (own / "report.html").stat().st_size > 0
    assert json.loads((out / "evaluation.json").read_text())["prompts"] == 8  # the run's own result stays
    with pytest.raises(PromptError, match="4 prompts asked, 3 there"):
        evaluate(out, 4, prompts, "test", Quiet())


def test_occupied_directory_is_refused_before_anything_starts(finished):
    out, _ = finished
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(RunDirectoryError):
        train(load_config(None, TINY), out, Quiet())
    assert sorted(p.name for p in out.iterdir()) == before


def test_start_table_of_another_shape_is_refused(finished, tmp_path):
    out, _ = finished
    config = load_config(None, [*TINY, f"distill.table={out / 'solver'}", "solver.points=3"])
    with pytest.raises(TableError, match="3 intervals of 2 points"):
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
    assert Image.open(picture).size == (16, 8)


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
    with pytest.raises(TableError, match="is for the backbone family sd3, the model is of the family simulated"):
        sample(str(tmp_path / "solver"), ["a"], 0, tmp_path / "none.png", SampleOptions())
    assert not (tmp_path / "none.png").exists()


def test_wrong_reward_stops_the_run_and_leaves_it_readable(small_ray, tmp_path):
    config = load_config(None, [*TINY, "rewards={bad: {head: 'tests.fakes:NanHead'}}"])
    with pytest.raises(RewardError, match="rollouts "):
        train(config, tmp_path / "run", Quiet())
    assert load_config(tmp_path / "run" / "config.yaml") == config
    late = load_config(None, [*TINY, "rewards={bad: {head: 'tests.fakes:LateNanHead'}}"])
    with pytest.raises(RewardError, match="rollouts "):
        train(late, tmp_path / "late", Quiet())
    assert load_config(tmp_path / "late" / "config.yaml") == late
    assert "report" in write_report(tmp_path / "late").name


def test_describe_says_what_and_how_long():
    what, how_long = describe(load_config(None))
    assert "45 iterations, 1440 images" in what and "minutes" in how_long


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_leave_a_checkpoint_and_an_exit_code(tmp_path, stop):
    out = tmp_path / "run"
    overrides = [*TINY, "rdpo.iterations=500", "backbone.options={latency: 0.01}"]
    command = [sys.executable, "-m", "epd_ray.cli", "train", "--out", str(out), *overrides]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
    deadline = time.monotonic() + 120
    while not list(out.glob("rollouts/*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"epd-ray train --resume {out}" in errors and "Traceback" not in errors
    assert load_newest(out / "checkpoints")["algorithm"]["rdpo"]["iteration"] >= 1


def test_prompts_that_the_model_cuts_are_counted_once(caplog):
    class Algo:
        def truncated(self, prompts):
            return sum(len(prompt) > 10 for prompt in prompts)

    trainer.warn_of_long_prompts(Algo(), ["a" * 20, "short", "b" * 20, "c"])
    assert [r.message for r in caplog.records] == ["2 of 4 prompts are longer than the model reads: their ends are cut"]
    trainer.warn_of_long_prompts(Algo(), ["a"])
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("gpus", "overrides", "warned"), [(8, [], 1), (0, [], 0), (8, ["cluster.rollout_gpus=1"], 0)])
def test_gpus_that_nobody_asks_for_are_mentioned(monkeypatch, caplog, gpus, overrides, warned):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0, "GPU": float(gpus)})
    session._warn_of_idle_gpus(load_config(None, ["backbone.model=owner/name", *overrides]))
    assert len(caplog.records) == warned
    session._warn_of_idle_gpus(load_config(None))  # the embedded model needs none
    assert len(caplog.records) == warned


@pytest.mark.parametrize(("key", "option"), [("afs", "solver.afs=false"), ("order", "solver.order=1")])
def test_a_start_with_other_options_is_refused(tmp_path, key, option):
    made = {"afs": True} if key == "afs" else {"order": 2}
    table = SolverTable(torch.tensor([[0.5]]), torch.ones(1, 1))
    Solver(table, torch.tensor([1.0, 0.1]), "flow", **made).save_pretrained(tmp_path)
    options = ["solver.intervals=1", "solver.points=1", f"distill.table={tmp_path}", option]
    with pytest.raises(TableError, match=f"has {key} .*set solver.{key} to match"):
        given_solver(load_config(None, options))


def saved(folder, **meta):
    table = SolverTable(torch.tensor([[0.5]]), torch.ones(1, 1))
    Solver(table, torch.tensor([1.0, 0.1]), "flow", meta=meta).save_pretrained(folder)
    return str(folder)


def test_a_solver_file_does_not_choose_what_code_runs(tmp_path):
    meta = {"backbone": "x", "model_id": "x", "registry": "os:mkdir", "options": {"path": str(tmp_path / "made")}}
    with pytest.raises(TableError, match=r"made with the backbone 'os:mkdir', .* pass --family os:mkdir"):
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
    with pytest.raises(ConfigError, match="takes no --device, --dtype or --resolution"):
        sample(solver, ["a"], 0, tmp_path / "a.png", SampleOptions(resolution=64))
    for out in (tmp_path / "a.xyz", tmp_path):
        with pytest.raises(ConfigError, match=r"is no image file: give a name that ends in \.png"):
            sample(solver, ["a"], 0, out, SampleOptions())


def test_a_start_from_another_schedule_says_so(small_ray, tmp_path, caplog):
    table = SolverTable(torch.tensor([[0.4], [0.5], [0.6]]), torch.ones(3, 1))
    Solver(table, torch.tensor([1.0, 0.7, 0.4, 0.1]), "flow", meta={"guidance_scale": 3.0}).save_pretrained(
        tmp_path / "s"
    )
    options = [*TINY, "solver.points=1", f"distill.table={tmp_path / 's'}", "rdpo.iterations=1"]
    train(load_config(None, options), tmp_path / "run", Quiet())
    said = [r.message for r in caplog.records if "was" in r.message]
    assert any("was made for sigmas 1 ... 0.1, the run uses its model's own: 1 ... " in message for message in said)
    assert any("was trained at guidance_scale 3.0, the pictures are made at 7.0" in message for message in said)
