"""Actors, nodes and drivers killed in the middle of a run, against the same run left alone."""

import logging
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
from epd_ray.bench.record import Record, under
from epd_ray.bench.settings import NO_STAGE_ONE, PUBLISHED_SOLVER, placeholders
from epd_ray.bench.timing import timed
from epd_ray.config.loading import load_config
from epd_ray.drawing.sampler import Sampler
from epd_ray.errors import EpdRayError, TaskError
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.session import rdpo_config
from epd_ray.runs.stage_one import stage_one
from epd_ray.stage_one.fit import fit_table

KINDS = ("rollout", "rollout", "reward", "learner")
ITERATIONS, HIT, LATER = 8, 3, 6  # the kill comes in the fourth iteration
PROMPTS = tuple(placeholders(16))
SEEDS = tuple(range(16))
SMALL_STAGE_ONE = (*PUBLISHED_SOLVER, "cluster.images_per_job=4", "distill.teacher_steps=2", "distill.grid=5")
Strike = Callable[[Caught], None]
Bench = TypeVar("Bench")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """The pictures that a run learned from, its policies, and its times.

    Attributes:
        rows: (rollout_id, reward, advantage, log_prob) of each picture.
        checksums: checksum of the policy after each iteration.
        seconds: seconds of each iteration.
        reported: seconds of recovery in the run's own metrics.
    """

    rows: list[tuple[str, float, float, float]]
    checksums: list[int]
    seconds: list[float]
    reported: float


def compare(hit: Trace, calm: Trace) -> Fault:
    """The damage of a disturbed run, by comparison with an undisturbed one."""
    seen, expected = [row[0] for row in hit.rows], {row[0] for row in calm.rows}
    late = sum(hit.seconds) - len(hit.seconds) * statistics.median(calm.seconds)
    identical = hit.rows == calm.rows and hit.checksums == calm.checksums
    return Fault(True, late, len(expected - set(seen)), len(seen) - len(set(seen)), identical, hit.reported)


class FaultBench:
    """One algorithm on one simulated cluster, which starts over for each fault.

    Args:
        nodes: the nodes of the cluster.
        algo: an algorithm with the trapped backbone, head and learner.
        folder: folder of the traps.
    """

    def __init__(self, nodes: Nodes, algo: RDPO, folder: Path) -> None:
        self.nodes, self.algo, self.folder = nodes, algo, folder
        self.draw, self.score, self.learn = (Trap(folder, name) for name in ("draw", "score", "learn"))
        self._start = algo.export_state()
        self.run()  # so that every actor has loaded its model
        self.actors = len(living_actors())
        self.calm = self.run()

    def run(self, begins: Callable[[int], None] = lambda iteration: None) -> Trace:
        """Run ITERATIONS iterations from the start.

        Args:
            begins: called with the number of each iteration, from 0, when it begins.
        """
        self.algo.import_state(self._start)
        rows, checksums, seconds, reported = [], [], [], 0.0
        for iteration in range(ITERATIONS):
            begins(iteration)
            seconds.append(timed(self.algo.train).seconds)
            rollouts = self.algo.last.rollouts
            rows += [(r.request.rollout_id, r.reward, r.advantage, r.rollout.log_prob) for r in rollouts]
            checksums.append(self.algo.checksum())
            reported += self.algo.last.metrics["time/recover"]
        return Trace(rows, checksums, seconds, reported)

    def fault(self, *traps: Trap, strike: Strike, later: Callable[[], object] | None = None) -> Fault:
        """Catch actors in iteration HIT of a run and strike them; afterwards wait until all actors are back.

        Args:
            traps: traps that are set, each for one actor.
            strike: called with each actor that is caught.
            later: called in iteration LATER; None means nothing is.
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
        """Wait until there are as many actors as at the start."""
        wait_for("actors that were lost are not back", lambda: len(living_actors()) >= self.actors)

    # -- strikes ------------------------------------------------------------------------------------------------------

    def remove(self, caught: Caught) -> None:
        """Kill the node of an actor."""
        self.nodes.remove(caught.node_id)

    def replace(self, kind: str) -> Strike:
        """A strike that kills the node of an actor and adds a new node of this kind at once."""

        def strike(caught: Caught) -> None:
            self.remove(caught)
            self.nodes.add(kind)

        return strike

    # -- faults -------------------------------------------------------------------------------------------------------

    def late_node(self) -> Fault:
        """Kill a rollout node, go on with the other one, and wait until a node that joins later has drawn too."""
        joined: list[str] = []
        found = self.fault(self.draw, strike=self.remove, later=lambda: joined.append(self.nodes.add("rollout")))
        drawn = drawn_on(self.folder, joined[0])
        wait_for("pictures of the new node", lambda: self.algo.train() and drawn.exists())
        return found

    def beside_training(self, work: Callable[[], list[Any]], trap: Trap) -> Fault:
        """Kill an actor during work that learns nothing.

        Args:
            work: returns numbers that must be the same without and with the kill.
            trap: a trap that the work passes.
        """
        calm = timed(work)
        trap.set()
        with beside(lambda: timed(work), [trap]) as running:
            kill(trap.wait())
            hit = running.result(PATIENCE_SECONDS)
        self.settle()
        missing = len(calm.answer) - len(hit.answer)
        late = hit.seconds - calm.seconds
        return Fault(True, late, max(missing, 0), max(-missing, 0), hit.answer == calm.answer)

    @property
    def sampler(self) -> Sampler:
        """The solver that the run starts from."""
        table = self.algo.config.table
        return Sampler("epd", table.intervals, "validation", "validation", table)

    def validation(self) -> list[float]:
        """Rewards of pictures that are drawn as in a validation."""
        rewards: list[float] = self.algo.sample_scored(self.sampler, PROMPTS, SEEDS).reward.tolist()
        return rewards

    def distilling(self) -> list[Any]:
        """The fits of stage 1, one for each interval."""
        stage = stage_one(load_config(None, SMALL_STAGE_ONE), PROMPTS, SEEDS)
        return list(fit_table(self.algo.work, stage, self.algo.facts.sigmas))


def failing_task(bench: FaultBench) -> tuple[str, float]:
    """The error of a task that fails wherever it runs, and the seconds until it was raised."""
    start = time.perf_counter()
    try:
        bench.algo.sample_scored(bench.sampler, [FAILING_PROMPT], [0])
    except TaskError as error:
        return str(error), time.perf_counter() - start
    raise RuntimeError(f"{FAILING_PROMPT!r} was drawn")


def kill(caught: Caught) -> None:
    """Send SIGKILL to the process of an actor."""
    os.kill(caught.pid, signal.SIGKILL)


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
    """Overrides of a run whose iterations take half a second, and whose actors the traps in a folder can catch."""
    options = f"{{folder: '{folder}', latency: 0.05}}"
    head = f"{{head: 'epd_ray.bench.fault_cluster:TrappedHead', options: {options}, resources: {{reward: 1}}}}"
    return [
        "backbone.family=epd_ray.bench.fault_cluster:TrappedBackbone",
        f"backbone.options={options}",
        f"rewards={{sim: {head}}}",
        NO_STAGE_ONE,
        "cluster.rollout_cpus=0.25",
        "cluster.rollout_resources={rollout: 1}",
    ]


@contextmanager
def fault_bench(overrides: Sequence[str] = ()) -> Iterator[FaultBench]:
    """An algorithm on a cluster with a head, two rollout nodes, a reward node and a learner node."""
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


def faults() -> Record:
    """Kill each kind of process and node that takes part in a run, one after another; `Fault` explains the figures."""
    found: dict[str, Fault] = {}
    while missing := [name for name in EVENTS if name not in found]:
        with fault_bench() as bench:
            for name in missing:
                found[name] = _or_not(name, EVENTS[name], bench)
                if not found[name].recovered:
                    break  # nodes or actors may be missing, so that the next fault gets a cluster of its own
    with fault_bench() as bench, tempfile.TemporaryDirectory() as folder:
        error, seconds = failing_task(bench)
        runs = RunBench(bench.nodes, Path(folder))
        for name, run_event in RUN_EVENTS.items():
            found[name] = _or_not(name, run_event, runs)
    rows = {name: asdict(fault) for name, fault in found.items()}
    rows["a task that always fails"] = {"error": error, "seconds": seconds}
    return Record("faults", {}, {key: value for name, row in rows.items() for key, value in under(name, row).items()})


def _or_not(name: str, event: Callable[[Bench], Fault], bench: Bench) -> Fault:
    """The damage of an event, also where the run does not recover."""
    try:
        return event(bench)
    except (EpdRayError, ray.exceptions.RayError, RuntimeError, TimeoutError):
        log.exception("the run did not recover from the loss of: %s", name)
        return Fault(False, None, 0, 0, False)
