"""The ways of stage 1: how near each comes to the teacher, the reward there, and what it costs."""

import multiprocessing
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from epd_ray.actors.beforehand import panel_of
from epd_ray.bench.models import scorers
from epd_ray.bench.record import Record, Value, Values, under
from epd_ray.bench.settings import NO_SCALES, PUBLISHED_SOLVER, TWO_POINTS
from epd_ray.bench.timing import timed
from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.evaluation.statistics import judged
from epd_ray.prompts.splits import load_prompts
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import rdpo_config
from epd_ray.runs.stage_one import descent_of, stage_one
from epd_ray.stage_one.fit import fit_table, losses
from epd_ray.stage_one.shard import Fit, as_table

GRADIENT = ("distill.method=gradient", "distill.steps=16")
LONE = "lone_start_scales"
DISTILLATIONS: dict[str, tuple[str, ...]] = {  # all have as many evaluations; "even" starts from evenly spaced points
    "two_points": PUBLISHED_SOLVER,
    "start_point": (NO_SCALES,),
    "two_points_scales": TWO_POINTS,
    "start_point_scales": (),
    LONE: ("solver.points=1",),  # in three times as many intervals
    "two_points_gradient": (*PUBLISHED_SOLVER, *GRADIENT),
    "two_points_gradient_even": (*PUBLISHED_SOLVER, *GRADIENT),
    "start_point_scales_gradient": GRADIENT,
}
FOLLOWED = 24  # held-out prompts that the teacher draws too


def distill(overrides: Sequence[str] = (), intervals: Sequence[int] = (2, 3), processes: int = 2) -> Record:
    """Stage 1 in each way of DISTILLATIONS, each in a process of its own with one torch thread.

    `residual_<i>` is the distance to the teacher on held-out prompts after interval i, relative to the teacher's step,
    and `final_rms` the root mean square distance of the final latents, relative to their size. `reward` is the mean raw
    score of the first head on those of the prompts that it judges. `seconds` is the time of fitting and `peak_mib` the
    resident memory above the start.

    Args:
        overrides: changes of the default run, for every way.
        intervals: values of N; a way with a lone start point has three times as many.
        processes: number of processes at a time.
    """
    names = [(n, name) for n in intervals for name in DISTILLATIONS]
    settings = [(*overrides, f"solver.intervals={3 * n if name == LONE else n}") for n, name in names]
    spawn = multiprocessing.get_context("spawn")
    values: dict[str, Value] = {}
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        found = pool.map(_distilled, [name for _, name in names], settings)
        for (n, name), figures in zip(names, found, strict=True):
            values |= under(f"{n}/{name}", figures)
    return Record("distill", {}, values)


def _distilled(name: str, overrides: Sequence[str]) -> Values:
    torch.set_num_threads(1)
    config = load_config(None, [*overrides, *DISTILLATIONS[name]])
    prompts = load_prompts(config.prompts, config.seed, panel_of(config))
    own = rdpo_config(config, prompts.train, rows=prompts.rows)
    worker = own.worker_spec.build()
    facts = worker.describe(config.solver.intervals)

    def work(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(worker, method)(*a) for a in arguments]

    chosen, held = prompts.train[: config.distill.prompts], prompts.validation
    stage = stage_one(config, chosen, noise_seeds(Purpose.STAGE_ONE, config.seed, len(chosen)))
    descent, before = descent_of(config, facts), _peak_mib()
    fitted = timed(partial(fit_table, work, stage, facts.sigmas, descent, from_least_squares="even" not in name))
    fits, peak = fitted.answer, _peak_mib() - before
    seeds = noise_seeds(Purpose.VALIDATION, config.seed, len(held))
    left = losses(work, stage_one(config, held[:FOLLOWED], seeds[:FOLLOWED]), fits)
    return {
        **{f"residual_{i}": loss.residual for i, loss in enumerate(left)},
        "final_rms": (left[-1].distance / left[-1].size) ** 0.5,
        "reward": _reward(config, worker, own, fits, held, seeds),
        "seconds": fitted.seconds,
        "peak_mib": peak,
    }


def _reward(
    config: RunConfig,
    worker: RolloutWorker,
    own: RDPOConfig,
    fits: Sequence[Fit],
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> float:
    """Mean raw score of the first head over the pictures of a fitted table whose prompts it judges."""
    s, size = config.solver, config.cluster.images_per_job
    sampler = Sampler("epd", s.intervals, "distilled", "distilled", as_table(fits), s.afs, s.order)
    scorer, scores = scorers(own.reward_specs)[0], []
    for i in range(0, len(prompts), size):
        part = prompts[i : i + size]
        images = worker.sample(sampler, part, seeds[i : i + size])
        ids = [str(j) for j in range(i, i + len(part))]
        scores.append(scorer.score(images, part, ids, own.routes.given(scorer.name, part)))
    return float(judged(np.concatenate(scores)).mean())


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
