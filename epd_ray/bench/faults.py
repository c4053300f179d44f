"""Faults: actors and whole nodes killed in the middle of a run, against the same run left alone."""

import logging
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import ray

from epd_ray.bench.fault_cluster import (
    FAILING_PROMPT,
    FOLDER,
    PATIENCE_SECONDS,
    Caught,
    Fault,
    Nodes,
    Trap,
    TrappedLearner,
    beside,
    drawn_on,
    living_actors,
    simulated_nodes,
    wait_for,
)
from epd_ray.bench.fault_runs import RUN_EVENTS, RunBench
from epd_ray.config.loading import load_config
from epd_ray.drawing.sampler import Sampler
from epd_ray.errors import EpdRayError, TaskError
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.session import rdpo_config
from epd_ray.stage_one.fit import StageOne, fit_table

KINDS = ("rollout", "rollout", "reward", "learner")
ITERATIONS, HIT, LATER = 8, 3, 6  # the kill comes in the fourth iteration
PROMPTS = tuple(f"prompt {i}" for i in range(16))
SEEDS = tuple(range(16))
Strike = Callable[[Caught], None]
Answer = TypeVar("Answer")
Bench = TypeVar("Bench")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """What a run learned from, what became of its policy, and when.

    Attributes:
        rows: (rollout_id, reward, advantage, log_prob) of all pictures.
        checksums: of the policy after each iteration.
        seconds: of each iteration.
        reported: seconds of recovery, by the run's own metrics.
    """

    rows: list[tuple[str, float, float, float]]
    checksums: list[int]
    seconds: list[float]
    reported: float


def compare(hit: Trace, calm: Trace) -> Fault:
    """The figures of a disturbed run."""
    seen, expected = [row[0] for row in hit.rows], {row[0] for row in calm.rows}
    late = sum(hit.seconds) - len(hit.seconds) * statistics.median(calm.seconds)
    identical = hit.rows == calm.rows and hit.checksums == calm.checksums
    return Fault(True, late, len(expected - set(seen)), len(seen) - len(set(seen)), identical, hit.reported)


class FaultBench:
    """One algorithm on one simulated cluster, started over for each fault.

    Args:
        nodes: of the cluster.
        algo: with the trapped backbone, head and learner.
        folder: of the traps.
    """

    def __init__(self, nodes: Nodes, algo: RDPO, folder: Path) -> None:
        self.nodes, self.algo, self.folder = nodes, algo, folder
        self.draw, self.score, self.learn = (Trap(folder, name) for name in ("draw", "score", "learn"))
        self._start = algo.export_state()
        self.run()  # every actor loads what it works with
        self.actors = len(living_actors())
        self.calm = self.run()

    def run(self, begins: Callable[[int], None] = lambda iteration: None) -> Trace:
        """ITERATIONS from the start.

        Args:
            begins: told the number of each iteration, from 0.
        """
        self.algo.import_state(self._start)
        rows, checksums, seconds, reported = [], [], [], 0.0
        for iteration in range(ITERATIONS):
            begins(iteration)
            start = time.perf_counter()
            self.algo.train()
            seconds.append(time.perf_counter() - start)
            rollouts = self.algo.last.rollouts
            rows += [(r.request.rollout_id, r.reward, r.advantage, r.rollout.log_prob) for r in rollouts]
            checksums.append(self.algo.checksum())
            reported += self.algo.last.metrics["time/recover"]
        return Trace(rows, checksums, seconds, reported)

    def fault(self, *traps: Trap, strike: Strike, later: Callable[[], object] | None = None) -> Fault:
        """Catch actors in the middle of a run and strike; afterwards wait until all actors are back.

        Args:
            traps: that are set.
            strike: what becomes of each actor that is caught.
            later: done in iteration LATER.
        """
        reached = {HIT: Event(), LATER: Event()}
        with beside(lambda: self.run(lambda i: reached[i].set() if i in reached else None), traps) as running:
            reached[HIT].wait(PATIENCE_SECONDS)
            for trap in traps:
                trap.set()
            for trap in traps:
                strike(trap.wait())
            if later is not None:
                reached[LATER].wait(PATIENCE_SECONDS)
                later()
            hit = running.result(PATIENCE_SECONDS)
        self.settle()
        return compare(hit, self.calm)

    def settle(self) -> None:
        """Wait for as many actors as at the start."""
        wait_for("actors that were lost are not back", lambda: len(living_actors()) >= self.actors)

    # -- strikes ------------------------------------------------------------------------------------------------------

    def remove(self, caught: Caught) -> None:
        """The end of an actor's node."""
        self.nodes.remove(caught.node_id)

    def replace(self, kind: str) -> Strike:
        """The end of an actor's node, and a new one that joins at once."""

        def strike(caught: Caught) -> None:
            self.remove(caught)
            self.nodes.add(kind)

        return strike

    # -- faults -------------------------------------------------------------------------------------------------------

    def late_node(self) -> Fault:
        """A rollout node is lost; the run goes on with the other; one that joins later draws too, without a restart."""
        joined: list[str] = []
        found = self.fault(self.draw, strike=self.remove, later=lambda: joined.append(self.nodes.add("rollout")))
        drawn = drawn_on(self.folder, joined[0])
        wait_for("pictures of the new node", lambda: self.algo.train() and drawn.exists())
        return found

    def beside_training(self, work: Callable[[], list[Any]], trap: Trap) -> Fault:
        """A kill during work that learns nothing.

        Args:
            work: gives numbers that must be the same.
            trap: on its way.
        """
        calm, expected = _timed(work)
        trap.set()
        with beside(lambda: _timed(work), [trap]) as running:
            kill(trap.wait())
            hit, found = running.result(PATIENCE_SECONDS)
        self.settle()
        missing = len(expected) - len(found)
        return Fault(True, hit - calm, max(missing, 0), max(-missing, 0), found == expected)

    @property
    def sampler(self) -> Sampler:
        """The solver of the start."""
        table = self.algo.config.table
        return Sampler("epd", table.intervals, "validation", "validation", table)

    def validation(self) -> list[float]:
        """Rewards of held-out prompts, as a validation draws them."""
        rewards: list[float] = self.algo.sample_scored(self.sampler, PROMPTS, SEEDS).reward.tolist()
        return rewards

    def distilling(self) -> list[Any]:
        """The table of stage 1, interval by interval."""
        stage = StageOne(2, 2, PROMPTS, SEEDS, shard_size=4, teacher_steps=2, grid=5, min_weight=0.05)
        return list(fit_table(self.algo.work, stage, self.algo.facts.sigmas))


def failing_task(bench: FaultBench) -> tuple[str, float]:
    """What is said of a task that fails wherever it runs, and after how many seconds."""
    start = time.perf_counter()
    try:
        bench.algo.sample_scored(bench.sampler, [FAILING_PROMPT], [0])
    except TaskError as error:
        return str(error), time.perf_counter() - start
    raise RuntimeError(f"{FAILING_PROMPT!r} was drawn")


def kill(caught: Caught) -> None:
    """SIGKILL to an actor's process."""
    os.kill(caught.pid, signal.SIGKILL)


def _timed(work: Callable[[], Answer]) -> tuple[float, Answer]:
    start = time.perf_counter()
    answer = work()
    return time.perf_counter() - start, answer


EVENTS: dict[str, Callable[[FaultBench], Fault]] = {
    "rollout actor": lambda b: b.fault(b.draw, strike=kill),
    "reward actor": lambda b: b.fault(b.score, strike=kill),
    "learner actor": lambda b: b.fault(b.learn, strike=kill),
    "rollout and reward actors": lambda b: b.fault(b.draw, b.score, strike=kill),
    "rollout actor, validating": lambda b: b.beside_training(b.validation, b.draw),
    "reward actor, validating": lambda b: b.beside_training(b.validation, b.score),
    "rollout actor, distilling": lambda b: b.beside_training(b.distilling, b.draw),
    "rollout node": lambda b: b.late_node(),
    "reward node": lambda b: b.fault(b.score, strike=b.replace("reward")),
    "learner node": lambda b: b.fault(b.learn, strike=b.replace("learner")),
}


def settings(folder: Path) -> list[str]:
    """Overrides of a run of half a second an iteration whose actors the traps can catch."""
    options = f"{{folder: '{folder}', latency: 0.05}}"
    head = f"{{head: 'epd_ray.bench.fault_cluster:TrappedHead', options: {options}, resources: {{reward: 1}}}}"
    return [
        "backbone.family=epd_ray.bench.fault_cluster:TrappedBackbone",
        f"backbone.options={options}",
        f"rewards={{sim: {head}}}",
        "distill.enabled=false",
        "cluster.rollout_cpus=0.25",
        "cluster.rollout_resources={rollout: 1}",
    ]


@contextmanager
def fault_bench(overrides: Sequence[str] = ()) -> Iterator[FaultBench]:
    """A cluster of two rollout nodes, a reward node and a learner node beside the head, and an algorithm on it."""
    with tempfile.TemporaryDirectory() as name, simulated_nodes(*KINDS) as nodes:
        config = rdpo_config(load_config(None, [*settings(Path(name)), *overrides]), list(PROMPTS))
        config.learners(
            learner_class=TrappedLearner,
            learner_config_dict={FOLDER: name},
            custom_resources_per_learner={"learner": 1},
        )
        algo: RDPO = config.build_algo()
        try:
            yield FaultBench(nodes, algo, Path(name))
        finally:
            algo.stop()


def faults() -> dict[str, Any]:
    """Kill whatever takes part in a run, one after the other; each against the same run left alone (see Fault)."""
    found: dict[str, Fault] = {}
    while missing := [name for name in EVENTS if name not in found]:
        with fault_bench() as bench:
            for name in missing:
                found[name] = _or_not(name, EVENTS[name], bench)
                if not found[name].recovered:
                    break  # nodes or actors may be missing: the next one gets a cluster of its own
    with fault_bench() as bench, tempfile.TemporaryDirectory() as folder:
        error, seconds = failing_task(bench)
        runs = RunBench(bench.nodes, Path(folder))
        for name, run_event in RUN_EVENTS.items():
            found[name] = _or_not(name, run_event, runs)
    flat = {f"{name}/{key}": value for name, fault in found.items() for key, value in asdict(fault).items()}
    return {**flat, "a task that always fails/error": error, "a task that always fails/seconds": seconds}


def _or_not(name: str, event: Callable[[Bench], Fault], bench: Bench) -> Fault:
    """A run that does not recover is a result too."""
    try:
        return event(bench)
    except (EpdRayError, ray.exceptions.RayError, RuntimeError, TimeoutError):
        log.exception("after the loss of %s", name)
        return Fault(False, math.nan, 0, 0, False)
