"""Seconds of one RDPO iteration: the pipeline of actors against a plain loop that does the same work."""

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import psutil
import torch
from tqdm import tqdm

from epd_ray.bench.flops import speed, tflop_per_eval
from epd_ray.bench.models import EMBEDDED, Subject, prompts
from epd_ray.bench.plain_loop import PlainLoop
from epd_ray.bench.random_models import Size
from epd_ray.bench.throughput import Passes
from epd_ray.bench.timing import timed
from epd_ray.config.loading import load_config
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.policy.network import PolicyNetwork
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import algorithm, rdpo_config
from epd_ray.rewards import HEADS
from epd_ray.rewards.scoring import Scorer
from epd_ray.types import RolloutJob

PROMPTS = 64
OF_FULL = (  # the settings of the published log for SD3 Medium, which took 15.66 s a step
    *("solver.intervals=10", "cluster.images_per_job=8"),
    *("rdpo.prompts_per_iteration=2", "rdpo.group_size=4", "rdpo.minibatch=4"),
)
Record = dict[str, float | int | str | bool | None]
Seconds = dict[str, float]


@dataclass(frozen=True)
class _Loop:
    """A way to run the plain loop, and what came of it, once per round.

    Attributes:
        at_once: pictures that the network draws together.
        threads: of torch.
        found: seconds of an iteration, in all, of all cores together, and of each stage.
    """

    at_once: int
    threads: int
    found: list[Seconds] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of an iteration, the median."""
        return statistics.median(one["iteration"] for one in self.found)

    def run(self, loop: PlainLoop, iteration: int) -> None:
        """One iteration."""
        before, start = torch.get_num_threads(), _cpu()
        torch.set_num_threads(self.threads)
        try:
            seconds = timed(lambda: loop.iterate(iteration, self.at_once))
        finally:
            torch.set_num_threads(before)
        self.found.append({"iteration": seconds, "cpu": _cpu() - start, **loop.seconds})


def step(
    model: str = EMBEDDED,
    size: Size | None = None,
    compile: bool = False,
    overrides: Sequence[str] = (),
    rounds: int | None = None,
    iterations: int | None = None,
    threads: Sequence[int] | None = None,
) -> Record:
    """Median seconds of one iteration of `RDPO` and of `PlainLoop`, same weights, batch and guidance, in turns.

    In every round the pipeline runs `iterations` from idle to idle, so filling and draining it counts; then the loop
    runs one iteration in each way while the actors have nothing to do: `batched` draws `images_per_job` pictures
    together, as the published code does, `single` one after another (not of a full model); on a CPU with one torch
    thread and with two.
    `ratio` and `ratio_single` are the seconds of the faster such loop over the pipeline's. `tflops` are the network's
    operations in drawing over the pipeline's whole iteration, `of_peak` their share of what the card can do. Below
    `pipeline` stand an iteration's seconds, those of all cores together (`cpu_s`), of its work, summed over the actors
    of a kind, and of waiting for it; below the loops their stages.

    Args:
        model: one of MODELS.
        size: see Subject.
        compile: see Subject.
        overrides: configuration of both; a full model has those of OF_FULL before them.
        rounds: odd; None: 5, of a full model 3.
        iterations: of the pipeline in a round; None: 4, of a full model 2.
        threads: that the loop is tried with; None: see above.
    """
    subject, chosen = Subject(model, size, compile=compile), prompts(PROMPTS)
    config = load_config(None, [*subject.overrides, *(OF_FULL if subject.full else ()), *overrides])
    name, reward = next(iter(config.rewards.items()))
    scorer = Scorer(name, HEADS.build(reward.head, reward.options))
    own = rdpo_config(config, chosen)
    worker = own.worker_spec.build()
    loop = PlainLoop(own, worker, scorer, chosen)
    counts = threads or ((1,) if torch.cuda.is_available() else (1, 2))
    batched = [_Loop(own.images_per_job, count) for count in counts]
    single = [] if subject.full else [_Loop(1, count) for count in counts]
    rounds, iterations = rounds or (3 if subject.full else 5), iterations or (2 if subject.full else 4)
    with algorithm(config, chosen) as algo:
        pipeline = _measure(algo, loop, [*batched, *single], rounds, iterations)
    ours = statistics.median(one["iteration"] for one in pipeline)
    ratios = {
        name: min(way.seconds for way in ways) / ours
        for name, ways in (("ratio", batched), ("ratio_single", single))
        if ways
    }
    return {
        **subject.facts,
        "images": own.images_per_iteration,
        "intervals": own.table.intervals,
        "points": own.table.points,
        "rollout_actors": own.num_env_runners,
        "staleness": own.max_staleness,
        **ratios,
        **speed(_tflop(own, chosen, worker) / ours, str(subject.facts["device"])),
        **_medians("pipeline", pipeline),
        **{k: v for way in batched for k, v in _medians(f"batched, threads {way.threads}", way.found).items()},
        **{k: v for way in single for k, v in _medians(f"single, threads {way.threads}", way.found).items()},
    }


def _tflop(config: RDPOConfig, chosen: Sequence[str], worker: RolloutWorker) -> float:
    """10^12 operations of the network for an iteration's pictures, which are drawn once more to count its passes."""
    passes = Passes(worker.backbone)
    watched = RolloutWorker(passes, worker.guidance_scale, worker.space, worker.sampler)
    parameters = PolicyNetwork(config.policy_spec).parameters_array()
    for i, requests in enumerate(propose(config.batch_plan, chosen, 0)):
        watched.generate(RolloutJob((0, i), 0, parameters, requests))
    return passes.rows * tflop_per_eval(worker.backbone, worker.guidance_scale)


def _measure(algo: RDPO, loop: PlainLoop, ways: Sequence[_Loop], rounds: int, iterations: int) -> list[Seconds]:
    """Seconds of the pipeline's iterations, in all and by stage, once per round; a round before warms up."""
    found = []
    turns = tqdm(range(rounds + 1), desc="rounds, the first to warm up")
    for number in turns:
        algo.stop_after(algo.policy_version + iterations)
        logged: list[Seconds] = []
        start = _cpu()
        seconds = timed(partial(_train, algo, iterations, logged)) / iterations
        cpu = (_cpu() - start) / iterations
        for way in ways:
            way.run(loop, number)
        spent = ", ".join(f"{way.found[-1]['iteration']:.3g}" for way in ways)
        turns.set_postfix_str(f"an iteration {seconds:.3g} s, of the loop {spent} s")  # all that a stopped bench leaves
        if number:
            stages = ("generate", "score", "learn", "wait")
            work = {stage: statistics.median(m[f"time/{stage}"] for m in logged) for stage in stages}
            found.append({"iteration": seconds, "cpu": cpu, **work})
        else:
            for way in ways:
                way.found.clear()
    return found


def _cpu() -> float:
    """Seconds that the cores have spent on this process and on those that it has started, Ray's among them."""
    driver, total = psutil.Process(), 0.0
    for process in (driver, *driver.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            total += used.user + used.system
    return total


def _train(algo: RDPO, iterations: int, logged: list[Seconds]) -> None:
    for _ in range(iterations):
        algo.train()
        logged.append(algo.last.metrics)


def _medians(name: str, found: Sequence[Seconds]) -> Record:
    return {f"{name}/{stage}_s": statistics.median(one[stage] for one in found) for stage in found[0]}
