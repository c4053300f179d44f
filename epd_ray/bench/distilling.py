"""Stage 1 by each of its methods: how near the teacher, the reward there, the cost."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from epd_ray.config.loading import RunConfig, load_config
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.prompts.splits import load_prompts
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.session import rdpo_config
from epd_ray.rewards import HEADS
from epd_ray.rewards.scoring import Scorer
from epd_ray.runs.trainer import descent_of, stage_one
from epd_ray.stage_one.fit import fit_table, losses
from epd_ray.stage_one.shard import Fit, as_table

TWO, NO_SCALES = ("solver.points=2", "solver.start_point=false"), ("rdpo.scale_dir=false",)
GRADIENT = ("distill.method=gradient", "distill.steps=16")
LONE = "lone_start_scales"
DISTILLATIONS: dict[str, tuple[str, ...]] = {  # all with as many evaluations; "even" starts from evenly spaced points
    "two_points": (*TWO, *NO_SCALES),
    "start_point": NO_SCALES,
    "two_points_scales": TWO,
    "start_point_scales": (),
    LONE: ("solver.points=1",),  # in three times as many intervals
    "two_points_gradient": (*TWO, *NO_SCALES, *GRADIENT),
    "two_points_gradient_even": (*TWO, *NO_SCALES, *GRADIENT),
    "start_point_scales_gradient": GRADIENT,
}
FOLLOWED = 24  # held-out prompts that the teacher draws too
Record = dict[str, float | int | str | bool | None]


def distill(overrides: Sequence[str] = (), intervals: Sequence[int] = (2, 3), processes: int = 2) -> Record:
    """Stage 1 by each of its methods: how near the teacher on held-out prompts, the reward there, the cost.

    Each in a process of its own, on one core: `seconds` of fitting, `peak_mib` of resident memory above the start.
    `residual_<i>` is relative to the teacher's step in interval i, `final_rms` the distance of the final latents.
    """
    jobs = [
        (name, (*overrides, f"solver.intervals={3 * n if name == LONE else n}"))
        for n in intervals
        for name in DISTILLATIONS
    ]
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
    stage = stage_one(config, chosen, noise_seeds(Purpose.STAGE_ONE, config.seed, len(chosen)))
    before, start = _peak_mib(), time.perf_counter()
    fits = fit_table(work, stage, facts.sigmas, descent_of(config, facts), from_least_squares="even" not in name)
    seconds, peak = time.perf_counter() - start, _peak_mib() - before
    seeds = noise_seeds(Purpose.VALIDATION, config.seed, len(held))
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
