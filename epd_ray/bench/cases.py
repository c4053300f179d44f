"""Measurements against something in the same run, as ratios of medians. Each case returns a flat record."""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epd_ray.bench.batching import batching
from epd_ray.bench.efficiency import efficiency
from epd_ray.bench.faults import faults
from epd_ray.bench.kept import FOLDER
from epd_ray.bench.scale import flat, scale
from epd_ray.bench.scoring import scoring
from epd_ray.bench.search import search
from epd_ray.config import RunConfig, load_config
from epd_ray.prompts import load_prompts
from epd_ray.rewards import HEADS
from epd_ray.rollout import RolloutWorker
from epd_ray.sampling import Sampler
from epd_ray.scoring import Scorer
from epd_ray.session import algorithm, rdpo_config
from epd_ray.shard import Fit, as_table
from epd_ray.stage_one import fit_table, losses
from epd_ray.trainer import descent_of, noise_seeds, stage_one

SIMULATED = ("backbone.family=simulated", "rewards={sim: {head: simulated}}", "distill.enabled=false")
GRADIENT = ("distill.method=gradient", "distill.steps=16")
SCALES = ("distill.scale_range=0.2", "rdpo.scale_dir=true", "rdpo.scale_time=true")
DISTILLATIONS: dict[str, tuple[str, ...]] = {  # and where "even" starts from evenly spaced points
    "least_squares": (),
    "gradient": GRADIENT,
    "gradient_even": GRADIENT,
    "gradient_scales": (*GRADIENT, *SCALES),
}
FOLLOWED = 24  # held-out prompts that the teacher draws too
Record = dict[str, float | int | str | bool | None]


def overhead(iterations: int = 200) -> Record:
    """RLlib's and Ray's share of an iteration: a simulated backbone without latency, 2 rollout actors.

    The whole iteration counts as overhead except the workers' own time, which the actors measure themselves.
    """
    config = load_config(None, [*SIMULATED, "rdpo.staleness=0"])
    with algorithm(config, [f"prompt {i}" for i in range(64)]) as algo:
        totals, works = [], []
        for _ in range(iterations):
            start = time.perf_counter()
            algo.train()
            totals.append(time.perf_counter() - start)
            m = algo.last.metrics
            works.append(m["time/generate"] / config.cluster.rollout_actors + m["time/score"])
    total, work = statistics.median(totals), statistics.median(works)
    return {
        "iterations": iterations,
        "iteration_ms": 1e3 * total,
        "workers_ms": 1e3 * work,
        "overhead_ms": 1e3 * (total - work),
    }


def overlap(iterations: int = 12) -> Record:
    """Seconds per iteration with staleness 1 against 0, where generating and scoring take equally long.

    `of_longer_stage` is the overlapped iteration against the longer stage, as the actors measured it in the same run.
    """
    medians = {}
    stages: list[float] = []
    for staleness in (0, 1):
        # 4 jobs on 2 actors, 4 drift calls of 60 ms each: 0.48 s; one head scores 4 jobs in 0.12 s each: 0.48 s.
        latencies = ("backbone.options={latency: 0.06}", "rewards.sim.options={latency: 0.12}")
        config = load_config(None, [*SIMULATED, *latencies, f"rdpo.staleness={staleness}"])
        with algorithm(config, [f"prompt {i}" for i in range(64)]) as algo:
            seconds, stages = [], []
            for _ in range(iterations):
                seconds.append(_timed(algo.train))
                m = algo.last.metrics
                stages.append(max(m["time/generate"] / config.cluster.rollout_actors, m["time/score"]))
        medians[staleness] = statistics.median(seconds[2:])
    return {
        "synchronous_s": medians[0],
        "overlapped_s": medians[1],
        "ratio": medians[1] / medians[0],
        "longer_stage_s": statistics.median(stages[2:]),
        "of_longer_stage": medians[1] / statistics.median(stages[2:]),
    }


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def distill(overrides: Sequence[str] = (), intervals: Sequence[int] = (2, 3), processes: int = 2) -> Record:
    """Stage 1 by least squares and by gradient: how near the teacher on held-out prompts, the reward there, the cost.

    Each in a process of its own, on one core: `seconds` of fitting, `peak_mib` of resident memory above the start.
    `residual_<i>` is relative to the teacher's step in interval i, `final_rms` the distance of the final latents.
    """
    jobs = [(name, (*overrides, f"solver.intervals={n}")) for n in intervals for name in DISTILLATIONS]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        found = pool.map(_distilled, *zip(*jobs, strict=True))
        named = zip([f"{n}/{name}" for n in intervals for name in DISTILLATIONS], found, strict=True)
        return {f"{job}/{key}": value for job, record in named for key, value in record.items()}


def _distilled(name: str, overrides: Sequence[str]) -> Record:
    torch.set_num_threads(1)
    config = load_config(None, [*overrides, *DISTILLATIONS[name]])
    prompts = load_prompts(config.prompts, config.seed)
    worker = rdpo_config(config, prompts.train).worker_spec.build()
    facts = worker.describe(config.solver.intervals)

    def work(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(worker, method)(*a) for a in arguments]

    chosen, held = prompts.train[: config.distill.prompts], prompts.validation
    stage = stage_one(config, chosen, noise_seeds(config, "distill", len(chosen)))
    before, start = _peak_mib(), time.perf_counter()
    fits = fit_table(work, stage, facts.sigmas, descent_of(config, facts), from_least_squares=name != "gradient_even")
    seconds, peak = time.perf_counter() - start, _peak_mib() - before
    seeds = noise_seeds(config, "validation", len(held))
    left = losses(work, stage_one(config, held[:FOLLOWED], seeds[:FOLLOWED]), fits)
    return {
        **{f"residual_{i}": loss.residual for i, loss in enumerate(left)},
        "final_rms": (left[-1].distance / left[-1].size) ** 0.5,
        "reward": _reward(config, worker, fits, held, seeds),
        "seconds": seconds,
        "peak_mib": peak,
    }


def _reward(
    config: RunConfig, worker: RolloutWorker, fits: Sequence[Fit], prompts: Sequence[str], seeds: Sequence[int]
) -> float:
    """Mean raw score of the first head."""
    name, head = next(iter(config.rewards.items()))
    scorer = Scorer(name, HEADS.build(head.head, head.options))
    s, size = config.solver, config.cluster.images_per_job
    sampler = Sampler("epd", s.intervals, "distilled", "distilled", as_table(fits), s.afs, s.order)
    scores = []
    for i in range(0, len(prompts), size):
        part = prompts[i : i + size]
        images = worker.sample(sampler, part, seeds[i : i + size])
        scores.append(scorer.score(images, part, [str(j) for j in range(i, i + len(part))]))
    return float(np.concatenate(scores).mean())


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


CASES: dict[str, Callable[[], Record]] = {
    "overhead": overhead,
    "overlap": overlap,
    "efficiency": efficiency,
    "search": search,
    "distill": distill,
    "batching": batching,
    "scale": scale,
    "flat": flat,
    "faults": faults,
    "scoring": scoring,
}
SEEDED: dict[str, Callable[..., Record]] = {"efficiency": efficiency, "search": search}  # whose parts are kept in files


def measured(case: str, seeds: int | None = None, folder: Path = FOLDER) -> Record:
    """A case's record.

    Args:
        case: a name in CASES.
        seeds: how many, for the cases in SEEDED; None: each one's own number.
        folder: where those keep what they have measured.
    """
    if case not in SEEDED:
        return CASES[case]()
    return SEEDED[case](folder=folder) if seeds is None else SEEDED[case](range(seeds), folder)
