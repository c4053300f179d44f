"""Seconds of one RDPO iteration: the pipeline of actors against a plain loop that does the same work."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median

import psutil
import torch
from tqdm import tqdm

from epd_ray.bench.flops import speed
from epd_ray.bench.models import DEFAULT_SUBJECT, Subject, prompts
from epd_ray.bench.passes import RecordedJobs, jobs_of
from epd_ray.bench.plain_loop import PlainLoop
from epd_ray.bench.record import Record, Value, under
from epd_ray.bench.timing import timed
from epd_ray.config.loading import load_config
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import algorithm, rdpo_config

PROMPTS = 64
# How the published log for SD3 Medium, which took 15.66 s a step, differs from the defaults; 8 pictures make a step.
OF_FULL = ("solver.intervals=10", "rdpo.prompts_per_iteration=2", "rdpo.minibatch_size=4")
STAGES = ("generate", "score", "learn", "wait")
Seconds = Mapping[str, float]


@dataclass(frozen=True)
class _Loop:
    """A way to run the plain loop.

    Attributes:
        kind: "batched" or "single".
        at_once: number of pictures that the network draws together.
        threads: number of torch's threads.
    """

    kind: str
    at_once: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.kind}, threads {self.threads}"

    def run(self, loop: PlainLoop, iteration: int) -> Seconds:
        """Seconds of one iteration: in all, of all cores together, and of each stage."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            total = _spent(lambda: loop.iterate(iteration, self.at_once))
        finally:
            torch.set_num_threads(before)
        return {**total, **loop.seconds}


def step(
    subject: Subject = DEFAULT_SUBJECT,
    overrides: Sequence[str] = (),
    rounds: int | None = None,
    iterations: int | None = None,
    threads: Sequence[int] | None = None,
) -> Record:
    """Median seconds of one iteration of `RDPO` and of `PlainLoop`, in turns, with the same weights and settings.

    In every round the pipeline runs some iterations from idle to idle, so that filling and draining it counts. Then the
    loop runs one iteration in each way while the actors have nothing to do: `batched` draws as many pictures together
    as a rollout job has, as the published code does, and `single` one after another, which a full model leaves out.
    `ratio` and `ratio_single` are the seconds of the fastest such loop over those of the pipeline. `tflops` is the
    network's operations over the time of the pipeline's whole iteration. The row `pipeline` has the seconds of an
    iteration, of all cores together (`cpu_s`), of each kind of work summed over its actors, and of waiting for them.
    The other rows have the stages of the loops.

    Args:
        subject: the model.
        overrides: changes of the default run, for the pipeline and the loop; a full model starts from OF_FULL.
        rounds: number of counted rounds, odd; None means 5, or 3 with a full model.
        iterations: number of the pipeline's iterations in a round; None means 4, or 2 with a full model.
        threads: numbers of torch's threads to try for the loop; None means 1 on a GPU, and 1 and 2 on a CPU.
    """
    chosen = prompts(PROMPTS)
    config = load_config(None, [*subject.overrides, *(OF_FULL if subject.full else ()), *overrides])
    own = rdpo_config(config, chosen)
    worker = own.worker_spec.build()
    counts = threads or ((1,) if torch.cuda.is_available() else (1, 2))
    at_once = {"batched": own.images_per_job} if subject.full else {"batched": own.images_per_job, "single": 1}
    ways = [_Loop(kind, size, count) for kind, size in at_once.items() for count in counts]
    rounds, iterations = rounds or (3 if subject.full else 5), iterations or (2 if subject.full else 4)
    with algorithm(config, chosen) as algo:
        found = _measure(algo, PlainLoop(own, worker, chosen), ways, rounds, iterations)
    ours = found["pipeline"]["iteration"]
    values: dict[str, Value] = {}
    for kind, name in (("batched", "ratio"), ("single", "ratio_single")):
        if kind in at_once:
            values[name] = min(found[way.name]["iteration"] for way in ways if way.kind == kind) / ours
    values |= speed(RecordedJobs(worker, jobs_of(own, chosen, 0)).tflop / ours)
    for row, seconds in found.items():
        values |= under(row, {f"{stage}_s": value for stage, value in seconds.items()})
    return Record("step", {**subject.facts, **_settings(own)}, values)


def _settings(config: RDPOConfig) -> dict[str, Value]:
    return {
        "images": config.batch_plan.images,
        "intervals": config.table.intervals,
        "points": config.table.points,
        "rollout_actors": config.num_env_runners,
        "staleness": config.staleness,
    }


def _measure(
    algo: RDPO, loop: PlainLoop, ways: Sequence[_Loop], rounds: int, iterations: int
) -> dict[str, dict[str, float]]:
    """Median seconds over the rounds, for "pipeline" and for each way; a first round warms up and is not counted."""
    turns = tqdm(range(rounds + 1), desc="rounds, the first to warm up")
    found: list[dict[str, Seconds]] = []
    for number in turns:
        row = {"pipeline": _pipeline(algo, iterations), **{way.name: way.run(loop, number) for way in ways}}
        found.append(row)
        spent = ", ".join(f"{name} {seconds['iteration']:.3g} s" for name, seconds in row.items())
        turns.set_postfix_str(f"an iteration: {spent}")  # all that a stopped bench leaves
    return {
        name: {stage: median(row[name][stage] for row in found[1:]) for stage in stages}
        for name, stages in found[0].items()
    }


def _pipeline(algo: RDPO, iterations: int) -> Seconds:
    """Seconds of an iteration of the pipeline, the mean of some from idle to idle, with the median of each stage."""
    algo.stop_after(algo.policy_version + iterations)
    logged: list[Mapping[str, float]] = []
    total = _spent(partial(_train, algo, iterations, logged))
    work = {stage: median(m[f"time/{stage}"] for m in logged) for stage in STAGES}
    return {**{name: seconds / iterations for name, seconds in total.items()}, **work}


def _train(algo: RDPO, iterations: int, logged: list[Mapping[str, float]]) -> None:
    for _ in range(iterations):
        algo.train()
        logged.append(algo.last.metrics)


def _spent(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call, by the clock and of all cores together."""
    before = _cpu()
    seconds = timed(call).seconds
    return {"iteration": seconds, "cpu": _cpu() - before}


def _cpu() -> float:
    """Seconds that the cores have spent on this process and on those that it has started, Ray's among them."""
    driver, total = psutil.Process(), 0.0
    for process in (driver, *driver.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            total += used.user + used.system
    return total
