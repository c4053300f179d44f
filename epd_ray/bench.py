"""Measurements against something in the same run, as ratios of medians. Each case returns a flat record."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from epd_ray.config import RunConfig, load_config
from epd_ray.distill import as_table
from epd_ray.prompts import load_prompts
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.sampling import Sampler
from epd_ray.session import algorithm
from epd_ray.statistics import bootstrap_mean
from epd_ray.trainer import noise_seeds

SIMULATED = ("backbone.family=simulated", "rewards={sim: {head: simulated}}", "distill.enabled=false")
REFERENCE = (
    "rdpo.baseline=mixed",
    "rdpo.same_latent=false",
    "rdpo.lr=7e-5",
    "rdpo.concentration=10",
    "rdpo.prompts_per_iteration=2",
    "rdpo.minibatch=4",
    "rdpo.concentration_bound=1e6",
    "rdpo.staleness=0",
)
REFERENCE_IMAGES = 3200
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
    """Seconds per iteration with staleness 1 against 0, where generating and scoring take equally long."""
    medians = {}
    for staleness in (0, 1):
        # 4 jobs on 2 actors, 6 drift calls of 40 ms each: 0.48 s; one head scores 4 jobs in 0.12 s each: 0.48 s.
        latencies = ("backbone.options={latency: 0.04}", "rewards.sim.options={latency: 0.12}")
        config = load_config(None, [*SIMULATED, *latencies, f"rdpo.staleness={staleness}"])
        with algorithm(config, [f"prompt {i}" for i in range(64)]) as algo:
            seconds = [_timed(algo.train) for _ in range(iterations)]
        medians[staleness] = statistics.median(seconds[2:])
    return {
        "synchronous_s": medians[0],
        "overlapped_s": medians[1],
        "ratio": medians[1] / medians[0],
        "longer_stage_s": 0.48,
    }


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reference(seed: int = 0, every: int = 1) -> Record:
    """Images that ours needs for the held-out reward that the reference's settings have after 3,200 images.

    Both start from the same distilled table and are judged on the same held-out prompts and seeds, of which neither
    trains on any. The reference: mixed baseline, own noise per image, its learning rate, batch and concentration.
    """
    ours = load_config(None, [f"seed={seed}"])
    theirs = load_config(None, [f"seed={seed}", *REFERENCE])
    prompts = load_prompts(ours.prompts, seed)
    with ExitStack() as stack:
        algo = stack.enter_context(algorithm(theirs, prompts.train))
        chosen = prompts.train[: ours.distill.prompts]
        fits = algo.distill(
            chosen, noise_seeds(ours, "distill", len(chosen)), grid=ours.distill.grid,
            teacher_steps=ours.distill.teacher_steps, min_weight=ours.distill.min_weight,
        )  # fmt: skip
        table = as_table(fits)
        algo.rebase(table)
        start = _held_out(algo, ours, prompts.validation)
        while algo.policy_version * algo.config.images_per_iteration < REFERENCE_IMAGES:
            algo.train()
        target = _held_out(algo, ours, prompts.validation)
    images, reached = None, start
    with algorithm(ours, prompts.train, table) as algo:
        while images is None and algo.policy_version * algo.config.images_per_iteration < REFERENCE_IMAGES:
            algo.train()
            if algo.policy_version % every == 0:
                reached = _held_out(algo, ours, prompts.validation)
                if reached >= target:
                    images = algo.policy_version * algo.config.images_per_iteration
    return {
        "seed": seed,
        "distilled_reward": start,
        "reference_reward": target,
        "reference_images": REFERENCE_IMAGES,
        "our_reward": reached,
        "our_images": images,
        "ratio": None if images is None else images / REFERENCE_IMAGES,
    }


def _held_out(algo: RDPO, config: RunConfig, prompts: list[str]) -> float:
    table = algo.mean_table()
    sampler = Sampler("epd", table.intervals, "held-out", "held-out", table, config.solver.afs, config.solver.order)
    seeds = noise_seeds(config, "validation", len(prompts))
    return bootstrap_mean(np.asarray(algo.sample_scored(sampler, prompts, seeds).reward)).mean


CASES: dict[str, Callable[[], Record]] = {"overhead": overhead, "overlap": overlap, "reference": reference}
