"""Sweeps: what they refuse, what they leave, how they go on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

import psutil
import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from typer.testing import CliRunner

from epd_ray import cli
from epd_ray.config.loading import dump_yaml, load_config
from epd_ray.errors import ConfigError, PlacementError, RunDirectoryError, TableError, TaskError
from epd_ray.prompts.splits import load_prompts
from epd_ray.solvers import Solver
from epd_ray.storage.lock import held
from epd_ray.sweep.space import KEYS, MUTABLE, Distribution, load_plan
from epd_ray.sweep.table import Result, as_csv, as_lines, ranking
from epd_ray.sweep.tuner import create, domain, resume, scheduler, sweep, within
from tests.fakes import Quiet

TINY = {
    "backbone": {"family": "tests.fakes:TableBackbone"},
    "rewards": {"sim": {"head": "simulated", "options": {"target": 1.0}, "num_cpus": 0.1}},
    "solver": {"intervals": 3},
    "prompts": {"validation": 8, "test": 8, "num_train": 16},
    "distill": {"prompts": 8},
    "rdpo": {"iterations": 6, "prompts_per_iteration": 4, "group_size": 4, "minibatch_size": 4},
    "evaluation": {"every": 2},
    "cluster": {"rollout_actors": 0, "rollout_cpus": 0.5, "learner_actors": 0, "learner_cpus": 0.1},
    "sweep": {"trials": 3, "space": {"rdpo.lr": {"choice": [1e-4, 1e-2]}, "rdpo.group_size": [2, 4]}},
}
ROOT = Path(__file__).parent.parent
LR = "rdpo.lr: {loguniform: [1e-4, 1e-2]}"


def plan(tmp_path: Path, *overrides: str):
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_yaml(TINY))
    return load_plan(path, overrides)


def refused(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        plan(tmp_path, *overrides)
    return str(error.value)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sweep.space={}", "sweep.space: is empty"),
        ("sweep.space={rdpo.lrr: [1e-3]}", "rdpo.lrr cannot be swept; did you mean 'rdpo.lr'?"),
        ("sweep.space={rewards.sim.weight: [1, 2]}", "rewards.sim.weight cannot be swept"),
        (
            "sweep.space={rdpo.iterations: [1, 2]}",
            "rdpo.iterations is the same for all trials (their budget is sweep.images)",
        ),
        ("sweep.space={rdpo.lr: {lognormal: [1e-3, 1]}}", "unknown key; did you mean 'loguniform'?"),
        ("sweep.space={rdpo.lr: {loguniform: [1e-2, 1e-3]}}", "expected the lower end first"),
        ("sweep.space={rdpo.lr: {loguniform: [0, 1e-3]}}", "loguniform is from 0, expected more than 0"),
        ("sweep.space={rdpo.lr: {loguniform: [1e-3]}}", "at least 2 is needed"),
        ("sweep.space={rdpo.lr: {}}", "nothing given, expected one of choice, uniform, loguniform, integers"),
        ("sweep.space={rdpo.lr: {choice: [1e-3], uniform: [0, 1]}}", "choice and uniform given"),
        ("sweep.space={rdpo.lr: []}", "at least 1 is needed"),
        ("sweep.space={rdpo.lr: 1e-3}", "sweep.space.rdpo.lr"),
        ("sweep.space={solver.points: {integers: [0, 3]}}", "sweep.space: solver.points: is 0, at least 1 is needed"),
        ("sweep.space={solver.points: {uniform: [1, 3]}}", "solver.points: is 1.0"),
        ("sweep.space={rdpo.lr: {uniform: [0.1, 3]}}", "rdpo.lr: is 3.0, at most 1 is possible"),
        (
            "sweep.space={rdpo.minibatch_size: [4, 12]}",
            "sweep.space: rdpo.minibatch_size: is 12, which does not divide the 16",
        ),
        (
            "sweep.space={rdpo.group_size: {integers: [2, 8]}, rdpo.minibatch_size: [8]}",
            "is 8, which does not divide the 12",
        ),
        ("sweep.trials=0", "sweep.trials: is 0, at least 1 is needed"),
        ("sweep.trails=2", "unknown key; did you mean 'trials'?"),
        ("sweep.grace=0", "more than 0 is needed"),
        ("sweep.scheduler=hyperband", "unknown 'hyperband'"),
        ("rdpo.normalisation=zscore", "cannot be compared"),
        ("rdpo.iterations=0", "sweep.images: the run has no iterations"),
    ],
)
def test_bad_plans_are_refused(tmp_path, override, said):
    problem = refused(tmp_path, override)
    assert said in problem
    assert all(len(line) < 400 and line.strip() for line in problem.splitlines())


def test_all_problems_come_at_once(tmp_path):
    problem = refused(tmp_path, "sweep.trials=0", "rdpo.lr=7", "sweep.space={}", "solver.pionts=2")
    assert {line.split(":")[0] for line in problem.splitlines()} == {
        "sweep.trials", "rdpo.lr", "sweep.space", "solver.pionts"
    }  # fmt: skip


def test_pbt_needs_a_key_that_can_change_and_all_of_its_trials(tmp_path):
    shape = "sweep.space={solver.points: [2, 3], solver.intervals: [2, 3]}"
    problem = refused(tmp_path, shape, "sweep.scheduler=pbt")
    assert "solver.points, solver.intervals cannot be changed then" in problem and "rdpo.lr" in problem
    assert "live together" in refused(tmp_path, "sweep.scheduler=pbt", "sweep.concurrent=2", "sweep.trials=4")
    assert plan(tmp_path, "sweep.scheduler=pbt", "sweep.space={rdpo.lr: [1e-3, 1e-2], solver.points: [2, 3]}")


def test_values_are_checked_together(tmp_path):
    assert plan(
        tmp_path, "sweep.space={rdpo.minibatch_size: [12], rdpo.group_size: [6, 12]}"
    )  # no divisor in the run alone
    problem = refused(tmp_path, "sweep.space={rdpo.minibatch_size: [8, 12], rdpo.group_size: [4, 12]}")
    assert problem.endswith("(with rdpo.minibatch_size=12, rdpo.group_size=4)")
    many = ", ".join(f"{key}: {{uniform: [0, 1]}}" for key in sorted(KEYS) if key.endswith(("coeff", "decay")))
    wide = f"sweep.space={{{many}, solver.points: {list(range(65))}, distill.grid: {list(range(70, 90))}}}"
    assert "solver.points: is 0, at least 1" in refused(tmp_path, wide)


def test_every_key_that_may_be_swept_exists():
    data = load_config(None).model_dump()
    for key in KEYS:
        section, name = key.split(".")
        assert name in data[section]
    assert {"rdpo.lr", "rdpo.concentration", "rdpo.group_size", "solver.points", "solver.intervals"} <= KEYS


def test_plans_read_back_as_they_were_written(tmp_path):
    first = plan(tmp_path, f"sweep.space={{{LR}, solver.points: {{integers: [2, 4]}}}}", "sweep.scheduler=pbt")
    (tmp_path / "out").mkdir()
    create(tmp_path / "out", first, load_prompts(first.config.prompts, 0))
    assert load_plan(tmp_path / "out" / "sweep.yaml") == first


# -- what trials are --------------------------------------------------------------------------------------------------


def test_budget_is_the_same_in_images(tmp_path):
    found = plan(tmp_path)
    assert found.images == 96
    for size, iterations in ((2, 12), (4, 6), (8, 3), (16, 1), (32, 1)):
        assert found.trial({"rdpo.group_size": size}).rdpo.iterations == iterations
    assert plan(tmp_path, "sweep.images=32").trial({}).rdpo.iterations == 2


def test_distributions_mean_what_they_say():
    def draw(**given):
        of = domain(Distribution(**given))
        return [of.sample() for _ in range(300)]

    assert set(draw(choice=["a", "b"])) == {"a", "b"}
    assert set(draw(integers=[1, 3])) == {1, 2, 3}
    assert all(2 <= value <= 3 for value in draw(uniform=[2, 3]))
    small = [value for value in draw(loguniform=[1e-4, 1e-2]) if value < 1e-3]
    assert 90 < len(small) < 210


def test_what_pbt_may_change_can_be_swept():
    assert MUTABLE < KEYS


def test_schedulers_count_images(tmp_path):
    asha = scheduler(plan(tmp_path, "sweep.grace=0.25", "sweep.reduction=2"))
    assert isinstance(asha, ASHAScheduler)
    assert (asha._time_attr, asha._max_t, asha._brackets[0]._rungs[-1][0]) == ("images", 96, 24)
    space = f"sweep.space={{{LR}, rdpo.num_epochs: [1, 2], solver.points: [2, 3]}}"
    pbt = scheduler(plan(tmp_path, "sweep.scheduler=pbt", "sweep.grace=0.5", space))
    assert isinstance(pbt, PopulationBasedTraining) and pbt._perturbation_interval == 48
    assert set(pbt._hyperparam_mutations) == {"rdpo.lr", "rdpo.num_epochs"}
    assert isinstance(pbt._hyperparam_mutations["rdpo.lr"], tune.search.sample.Float)
    assert within({"rdpo.lr": (1e-4, 1e-2)}, {"rdpo.lr": 0.5, "x": 1}) == {"rdpo.lr": 1e-2, "x": 1}


def test_table_is_ranked_and_complete():
    values = {"rdpo.lr": 1e-3}
    good = Result("trial-2", "stopped", values, 64, 2.0, 0.1, 0.4, 0.3, 0.5)
    better = Result("trial-1", "finished", values, 96, 3.0, 0.1, 0.6, 0.5, 0.7)
    failed = Result("trial-0", "failed", values, 32, 1.0, 0.1, 0.9, 0.8, 1.0, "reward head 'x': no, \"never\"")
    early = Result("trial-3", "failed", values, error="out of memory?")
    ranked = ranking([early, failed, good, better])
    assert [r.trial for r in ranked] == ["trial-1", "trial-2", "trial-0", "trial-3"]
    rows = list(csv.DictReader(as_csv(ranked).splitlines()))
    assert rows[0] | {"reward": "0.6", "rdpo.lr": "0.001", "status": "finished"} == rows[0]
    assert rows[2]["error"] == failed.error and rows[3]["reward"] == ""
    assert "0.6000 [0.5000, 0.7000] from 0.1000" in as_lines(ranked)[0] and "out of memory?" in as_lines(ranked)[3]
    assert as_lines([good] * 12)[-1] == "... and 2 more"


# -- directories ------------------------------------------------------------------------------------------------------


def test_directories_that_are_taken(tmp_path):
    found = plan(tmp_path)
    for name, file, said in (("a", "sweep.yaml", "another sweep"), ("b", "notes.txt", "is not empty")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("mine")
        with pytest.raises(RunDirectoryError, match=said):
            sweep(found, tmp_path / name, Quiet())
        assert [path.name for path in (tmp_path / name).iterdir()] == [file]
    with pytest.raises(RunDirectoryError, match="is no sweep"):
        resume(tmp_path / "b", Quiet())


@pytest.fixture
def stopped_early(monkeypatch):
    """No Ray, and Tune is stopped before it makes a trial; gives the arguments of what is faked."""
    asked = {}
    monkeypatch.setattr("epd_ray.sweep.tuner.run_session", lambda of, rows: asked.update(session=of) or nullcontext())
    monkeypatch.setattr("epd_ray.sweep.tuner.require_room", lambda *of: asked.update(room=of))
    monkeypatch.setattr("epd_ray.sweep.tuner._tune", lambda *of: [])
    return asked


def test_a_sweep_asks_for_what_its_cluster_section_says(tmp_path, stopped_early):
    with pytest.raises(KeyboardInterrupt):
        sweep(plan(tmp_path, "cluster.placement_timeout_s=7", "cluster.dashboard=true"), tmp_path / "out", Quiet())
    assert stopped_early["room"][1] == 7 and stopped_early["session"].cluster.dashboard


def test_a_sweep_that_was_stopped_before_its_first_trial_can_be_resumed(tmp_path, stopped_early, monkeypatch):
    plan(tmp_path)
    monkeypatch.chdir(tmp_path)
    begun = CliRunner().invoke(cli.app, ["sweep", "--config", "sweep.yaml", "--out", "out"])
    assert begun.exit_code == 130 and begun.stderr.endswith("\nstopped; continue with: epd-ray sweep --resume out\n")
    again = CliRunner().invoke(cli.app, ["sweep", "--resume", "out"])
    assert (again.exit_code, again.stderr) == (begun.exit_code, begun.stderr)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("lr: 0.001", "lr: 0.002", "rdpo.lr was 0.001, now 0.002"),
        ("trials: 3", "trials: 4", "sweep.trials was 3, now 4"),
        ("prompts_per_iteration: 4", "prompts_per_iteration: 8", "rdpo.prompts_per_iteration was 4, now 8"),
    ],
)
def test_a_sweep_goes_on_with_the_settings_that_it_began_with(tmp_path, stopped_early, before, now, said):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sweep(plan(tmp_path), out, Quiet())
    text = (out / "sweep.yaml").read_text()
    assert text.count(before) == 1
    (out / "sweep.yaml").write_text(text.replace(before, now))
    with pytest.raises(RunDirectoryError) as refused:
        resume(out, Quiet())
    assert str(refused.value) == f"{out} began with other settings: {said}. Put them back, or begin a new sweep"
    free = text.replace("rollout_actors: 1", "rollout_actors: 2").replace("concurrent: 2", "concurrent: 1")
    (out / "sweep.yaml").write_text(free)
    with pytest.raises(KeyboardInterrupt):
        resume(out, Quiet())
    texts = json.loads((out / "prompts.json").read_text())
    (out / "prompts.json").write_text(json.dumps(texts | {"train": texts["train"][::-1]}))
    with pytest.raises(RunDirectoryError, match=r"prompts\.json:train was .* prompts"):
        resume(out, Quiet())


def test_what_a_killed_creation_leaves_is_written_again(tmp_path, stopped_early):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".lock", "prompts.json", ".sweep.yaml.tmp"):
        (out / name).write_text("half")
    with pytest.raises(KeyboardInterrupt):
        sweep(plan(tmp_path), out, Quiet())
    assert load_plan(out / "sweep.yaml") == plan(tmp_path) and json.loads((out / "prompts.json").read_text())


def test_one_process_makes_a_sweep(tmp_path, stopped_early):
    out = tmp_path / "out"
    out.mkdir()
    with held(out / ".lock", "out"), pytest.raises(RunDirectoryError, match="in use"):
        sweep(plan(tmp_path), out, Quiet())
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_what_no_trial_could_use_leaves_no_directory(tmp_path, stopped_early, monkeypatch):
    with pytest.raises(TableError, match="nowhere/at/all"):
        sweep(plan(tmp_path, "distill.table=nowhere/at/all"), tmp_path / "out", Quiet())
    monkeypatch.setattr("epd_ray.runs.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        sweep(plan(tmp_path, "tracking.wandb={}"), tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_command_line_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str):
        return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, ["sweep", *arguments])

    for arguments, said in (
        ([], "sweep.space: is empty"),
        (["--resume", "nothing"], "is no sweep"),
        (["--resume", "nothing", "rdpo.lr=1"], "leave out everything else"),
        (["--config", "missing.yaml"], "cannot read the configuration"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


# -- whole sweeps -----------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(small_ray, tmp_path_factory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("sweeps")
    return folder / "out", sweep(plan(folder), folder / "out", Quiet())


@pytest.mark.slow
def test_sweep_leaves_a_table_and_the_best_solver(finished):
    out, lines = finished
    found = rows(out)
    assert [row["trial"] for row in found] != [] and {row["trial"] for row in found} == {
        f"trial-0000{i}" for i in range(3)
    }
    rewards = [float(row["reward"]) for row in found]
    assert rewards == sorted(rewards, reverse=True) and all(
        r >= float(row["start"]) for r, row in zip(rewards, found, strict=True)
    )
    assert {row["status"] for row in found} <= {"finished", "stopped"} and found[0]["error"] == ""
    assert all(int(row["images"]) <= 96 for row in found) and max(int(row["images"]) for row in found) == 96
    solver = Solver.from_pretrained(out / "best")
    assert solver.meta["validation_reward"] == pytest.approx(rewards[0], abs=1e-6)
    assert solver.meta["rewards"] == {"sim": 1.0} and solver.table.intervals == 3
    best = load_config(out / "best.yaml")
    assert best.rdpo.lr == float(found[0]["rdpo.lr"]) and best.rdpo.group_size == int(found[0]["rdpo.group_size"])
    assert best.rdpo.iterations * 4 * best.rdpo.group_size == 96
    assert lines[0].startswith(found[0]["trial"]) and lines[-2:] == [
        f"solver: {out / 'best'}",
        f"configuration: {out}/best.yaml",
    ]


@pytest.mark.slow
def test_finished_sweep_is_not_run_again(finished):
    out, _ = finished
    before = rows(out)
    drawn = results_of(out)  # Tune writes the files again, as they were
    resume(out, Quiet())
    assert rows(out) == before
    assert drawn == results_of(out) and len(drawn) == 3


@pytest.mark.slow
def test_same_seed_gives_the_same_rewards(finished, tmp_path):
    out, _ = finished
    twin = next(row for row in rows(out) if row["status"] == "finished")
    space = f"sweep.space={{rdpo.lr: [{twin['rdpo.lr']}], rdpo.group_size: [{twin['rdpo.group_size']}]}}"
    again = []
    for name in ("a", "b"):
        sweep(plan(tmp_path, space, "sweep.trials=1"), tmp_path / name, Quiet())
        again.append([rows(tmp_path / name)[0][key] for key in ("images", "start", "reward", "low", "high")])
    assert again[0] == again[1] == [twin[key] for key in ("images", "start", "reward", "low", "high")]
    assert {row["start"] for row in rows(out)} == {twin["start"]}


@pytest.mark.slow
def test_a_failing_trial_is_a_row_and_all_failing_is_an_error(small_ray, tmp_path):
    backbone = "backbone.family='tests.sweep_fakes:TwoPointsBackbone'"
    fragile = (backbone, "solver.start_point=false", "distill.enabled=false", "seed=1")  # draws both
    space = "sweep.space={solver.points: [2, 3]}"
    lines = sweep(plan(tmp_path, *fragile, space, "sweep.trials=2"), tmp_path / "some", Quiet())
    good, bad = rows(tmp_path / "some")
    assert (good["solver.points"], good["status"]) == ("2", "finished")
    assert (bad["solver.points"], bad["status"], bad["error"]) == ("3", "failed", "three points are too many")
    assert Solver.from_pretrained(tmp_path / "some" / "best").table.points == 2 and "three points" in lines[1]
    only = "sweep.space={solver.points: [3]}"
    with pytest.raises(TaskError, match=r"every trial.*three points are too many"):
        sweep(plan(tmp_path, *fragile, only, "sweep.trials=1"), tmp_path / "none", Quiet())
    assert [row["status"] for row in rows(tmp_path / "none")] == ["failed"] and not (tmp_path / "none/best").exists()


@pytest.mark.slow
def test_no_room_is_said_before_anything_starts(small_ray, tmp_path):
    with pytest.raises(PlacementError, match=r"after 1 s .*a trial: 1 x 64"):
        sweep(plan(tmp_path, "cluster.rollout_cpus=64", "cluster.placement_timeout_s=1"), tmp_path / "out", Quiet())


@pytest.mark.slow
def test_pbt_changes_what_the_learner_uses(small_ray, tmp_path, monkeypatch):
    # In step with each other, so that one takes over the other's policy however busy the machine is.
    monkeypatch.setattr("epd_ray.sweep.tuner.PopulationBasedTraining", partial(PopulationBasedTraining, synch=True))
    space = f"sweep.space={{{LR}}}"
    pbt = ("sweep.scheduler=pbt", "sweep.trials=2", "sweep.grace=0.3", "rdpo.iterations=8")
    sweep(plan(tmp_path, space, *pbt), tmp_path / "out", Quiet())
    used = {}
    for log in (tmp_path / "out" / "trials").glob("*/result.json"):
        results = [json.loads(line) for line in log.read_text().splitlines()]
        for result in results:
            rate = result["learners"]["default_policy"]["default_optimizer_learning_rate"]
            assert rate == pytest.approx(result["config"]["rdpo.lr"])
        used[log.parent.name] = {result["config"]["rdpo.lr"] for result in results}
    assert len(used) == 2 and any(len(rates) > 1 for rates in used.values())  # one took over the other's policy
    assert all(1e-4 <= rate <= 1e-2 for rates in used.values() for rate in rates)


IMAGES = 192


def begin(folder: Path, out: Path) -> "subprocess.Popen[str]":
    """A sweep in a process of its own, slow enough to be stopped."""
    slow = ["backbone.family='tests.sweep_fakes:SlowBackbone'", "distill.enabled=false", "sweep.scheduler=none"]
    long = [f"sweep.images={IMAGES}", "evaluation.every=2"]
    plan(folder)
    command = [sys.executable, "-m", "epd_ray.cli", "sweep", "--config", str(folder / "sweep.yaml"), "--out", str(out)]
    return subprocess.Popen([*command, *slow, *long], stderr=subprocess.PIPE, text=True, cwd=ROOT)


def results_of(out: Path) -> dict[str, list[int]]:
    """Trial -> the images of each of its results, in order; Tune copies the file over itself, so maybe not all yet."""
    whole = {
        log.parent.name: [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for log in out.glob("trials/*/result.json")
    }
    return {trial: [json.loads(line)["images"] for line in lines] for trial, lines in whole.items()}


def snapshot(out: Path) -> dict[str, tuple[str, int]]:
    """Trial -> its status and number of results, as Tune has written them down; in place, so maybe not whole yet."""
    try:
        written = [json.loads(path.read_text())["trial_data"] for path in out.glob("trials/experiment_state-*.json")]
    except json.JSONDecodeError:
        return {}
    found = {}
    for trial, so_far in (map(json.loads, pair) for pair in chain(*written)):
        results = (so_far["last_result"] or {}).get("training_iteration", 0)
        found[f"trial-{trial['trial_id'].rpartition('_')[2]}"] = trial["status"], results
    return found


def wait_for_a_finished_and_an_unfinished_trial(process, out: Path) -> tuple[dict[str, list[int]], str, str]:
    """Until a killed sweep would know of both, the second with a checkpoint and far from its end; and all results."""
    end = time.monotonic() + 600
    while time.monotonic() < end and process.poll() is None:
        known, images = snapshot(out), results_of(out)
        last = {name: results[-1] for name, results in images.items() if results}
        ended = [name for name, (status, _) in known.items() if status == "TERMINATED" and last.get(name) == IMAGES]
        going = [name for name, (_, count) in known.items() if count > 1 and last.get(name, IMAGES) <= IMAGES - 64]
        if ended and going:
            return images, ended[0], going[0]
        time.sleep(0.2)
    raise AssertionError(f"the sweep ended or hung at {results_of(out)}: {process.poll()}")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.nightly),
        pytest.param(signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_stopped_sweep_goes_on(tmp_path, number):
    out = tmp_path / "out"
    process = begin(tmp_path, out)
    family = []
    try:
        before, ended, going = wait_for_a_finished_and_an_unfinished_trial(process, out)
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    if number != signal.SIGKILL:
        assert process.returncode == 130 and f"stopped; continue with: epd-ray sweep --resume {out}" in said
        assert {row["status"] for row in rows(out)} >= {"finished", "unfinished"}
    _, left = psutil.wait_procs(family, timeout=120)
    assert not left, "processes of the first try outlive it"
    command = [sys.executable, "-m", "epd_ray.cli", "sweep", "--resume", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(rows(out)) == 3 and {row["status"] for row in rows(out)} == {"finished"}
    assert {row["images"] for row in rows(out)} == {str(IMAGES)}
    after = results_of(out)
    assert after[ended] == before[ended], "a finished trial ran again"
    assert after[going].count(before[going][0]) <= 1, "a trial began anew"
    assert (out / "best" / "solver.json").is_file()
