"""Actors, nodes, drivers and jobs, killed for good: the run goes on or is resumed, and ends bit by bit the same."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import psutil
import pytest
from _pytest.mark import ParameterSet

from epd_ray.bench import fault_cluster
from epd_ray.bench.fault_cluster import FAILING_PROMPT, Fault, StuckError, Trap, beside
from epd_ray.bench.fault_runs import RUN_EVENTS, RunBench
from epd_ray.bench.faults import EVENTS, PROMPTS, FaultBench, Trace, compare, failing_task, fault_bench
from epd_ray.storage.run_directory import RunDirectory
from tests.conftest import TINY


def test_figures_tell_what_is_lost_learned_twice_or_different() -> None:
    rows = [(name, 0.5, 1.0, -1.0) for name in "abcd"]
    calm = Trace(rows, [1, 2], [1.0, 1.0], 0.0)
    assert compare(Trace(rows, [1, 2], [1.0, 4.0], 2.0), calm) == Fault(True, 3.0, 0, 0, True, 2.0)
    lost = compare(replace(calm, rows=rows[:3]), calm)
    assert (lost.lost, lost.duplicated, lost.identical) == (1, 0, False)
    twice = compare(replace(calm, rows=[*rows, rows[0]]), calm)
    assert (twice.lost, twice.duplicated, twice.identical) == (0, 1, False)
    assert not compare(replace(calm, checksums=[1, 3]), calm).identical
    assert not compare(replace(calm, rows=[*rows[:3], ("d", 0.5, 1.0, -1.0000001)]), calm).identical


def test_work_that_is_given_up_has_ended_and_its_traps_are_gone(tmp_path: Path) -> None:
    trap, given_up = Trap(tmp_path, "draw"), Event()
    trap.set()
    with pytest.raises(TimeoutError, match="nobody"), beside(lambda: given_up.wait(60), [trap]) as running:
        Timer(0.3, given_up.set).start()
        raise TimeoutError("nobody")
    assert running.result(0)
    trap.spring()  # catches nobody


def test_work_that_never_ends_is_said_to_be_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_cluster, "PATIENCE_SECONDS", 0.05)
    never = Event()
    with pytest.raises(StuckError, match="has not ended 0 s after"), beside(never.wait, []) as running:
        running.result(0.05)
    never.set()


def one_of_each_kind(names: Iterable[str], *often: str) -> list[ParameterSet]:
    """All of them; the slow tests have those that are named, the nightly ones the rest."""
    assert set(often) <= set(names)
    return [pytest.param(n, marks=pytest.mark.slow if n in often else pytest.mark.nightly) for n in names]


@pytest.fixture(scope="module")
def bench(no_ray: None) -> Iterator[FaultBench]:
    with fault_bench() as built:
        yield built


@pytest.fixture(scope="module")
def runs(bench: FaultBench, tmp_path_factory: pytest.TempPathFactory) -> RunBench:
    return RunBench(bench.nodes, tmp_path_factory.mktemp("runs"))


def assert_unharmed(name: str, fault: Fault) -> None:
    sys.stdout.write(f"{name}: {fault}\n")  # shown by -rP
    assert (fault.recovered, fault.lost, fault.duplicated, fault.identical) == (True, 0, 0, True)


@pytest.mark.parametrize("name", one_of_each_kind(EVENTS, "rollout and reward actors", "reward node"))
def test_the_run_goes_on(bench: FaultBench, name: str) -> None:
    assert_unharmed(name, EVENTS[name](bench))


@pytest.mark.nightly
def test_a_task_that_always_fails_ends_the_run_after_it_failed_on_different_actors(bench: FaultBench) -> None:
    said, seconds = failing_task(bench)
    sys.stdout.write(f"{seconds:.1f} s: {said}\n")
    (actors,) = re.findall(r"failed 3 times, on rollout actors ([\d, ]+), last with RuntimeError: this prompt f", said)
    assert len(set(actors.split(", "))) == 2


@pytest.mark.parametrize("name", one_of_each_kind(RUN_EVENTS, "driver with its own Ray"))
def test_a_run_whose_driver_died_is_resumed(runs: RunBench, name: str) -> None:
    assert_unharmed(name, RUN_EVENTS[name](runs))


@pytest.mark.slow
def test_a_learner_that_dies_before_the_first_update_is_made_again(build) -> None:  # type: ignore[no-untyped-def]
    calm, hit = build(), build("cluster.learner_actors=1")
    (pid,) = hit.learner_group.foreach_learner(lambda learner: os.getpid())
    os.kill(pid.get(), signal.SIGKILL)
    for algo in (calm, hit):
        algo.rebase(algo.mean_table())
        algo.train()
    assert hit.checksum() == calm.checksum()


@pytest.mark.slow
def test_a_run_that_fails_says_so_in_one_line_and_can_be_resumed(tmp_path: Path) -> None:
    prompts, traps, run = tmp_path / "prompts.txt", tmp_path / "traps", tmp_path / "run"
    traps.mkdir()
    prompts.write_text("\n".join([FAILING_PROMPT, *PROMPTS]))
    settings = [
        "backbone.family=epd_ray.bench.fault_cluster:TrappedBackbone",
        f"backbone.options={{folder: '{traps}'}}",
        "rewards={sim: {head: simulated}}",
        "distill.enabled=false",
        f"prompts.train={prompts}",
        "prompts.validation=2",
        "prompts.test=2",
        "rdpo.prompts_per_iteration=13",
        "rdpo.minibatch_size=13",
    ]
    command = [sys.executable, "-m", "epd_ray.cli", "train", "--out", str(run), *settings]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
    (error,) = errors
    assert re.search(r"failed 3 times, on rollout actors \d+, \d+, last with RuntimeError: this prompt fails$", error)
    assert list(RunDirectory.open(run).checkpoints.glob("*.pt"))  # of the start, from which it goes on once mended


@pytest.mark.parametrize(
    "victim",
    [pytest.param("raylet", marks=pytest.mark.slow), pytest.param("gcs_server", marks=pytest.mark.nightly)],
)
def test_a_run_whose_own_ray_dies_ends_with_one_line_and_leaves_no_process(tmp_path: Path, victim: str) -> None:
    run = tmp_path / "run"
    actors = ["cluster.rollout_actors=1", "cluster.rollout_cpus=0.25", "rewards={sim: {head: simulated}}"]
    settings = [*TINY, *actors, "distill.enabled=false", "rdpo.iterations=5000", "backbone.options={latency: 0.01}"]
    command = [sys.executable, "-m", "epd_ray.cli", "train", "--out", str(run), *settings]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env) as process:
        try:
            fault_cluster.wait_for("a rollout file", lambda: list(run.glob("rollouts/*.parquet")))
            family = psutil.Process(process.pid).children(recursive=True)
            (found,) = [p for p in family if p.name() == victim]
            assert any(p.name().startswith("ray::") for p in family)  # actors, which have to end too
            found.kill()
            killed = time.monotonic()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - killed < 30 and process.returncode == 4, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert f"the {victim} of this command's own Ray died" in line and "--resume" in line
    assert "Traceback" not in errors
    fault_cluster.wait_for("the end of its actors", lambda: not [p for p in family if alive(p)])
    assert list(run.glob("checkpoints/*.pt"))


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; Ray's agents, which take up to two minutes to end, hold nothing of the run."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE and "Agent" not in process.name()


WATCHED = """
import sys, time
import ray
from epd_ray.actors import watch
from epd_ray.errors import ClusterError

begun = time.monotonic()

class Node:
    def dead_processes(self):
        return [("log_monitor", None), *([("gcs_server", None)] if time.monotonic() > begun + 1 else [])]

    def is_head(self):
        return False

watch.POLL_SECONDS, watch.GRACE_SECONDS = 0.1, 1.0
ray._private.worker._global_node = Node()
try:
    with watch.watched():
        try:
            time.sleep(60)
        except ClusterError:
            if sys.argv[1] == "stuck":  # in a clean-up that waits for the dead
                time.sleep(60)
            raise SystemError("wrapped, as in a call of Ray")
except ClusterError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(("clean_up", "code"), [("quick", 1), ("stuck", 4)])
def test_the_watch_over_ray_ends_the_work_and_at_last_the_process(clean_up: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, clean_up], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == code
    said = [line for line in done.stderr.splitlines() if "gcs_server of this command's own Ray died" in line]
    assert len(said) == 1 and said[0].startswith("error: ") == (clean_up == "stuck")
