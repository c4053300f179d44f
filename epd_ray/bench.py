"""Measurements against something in the same run, as ratios of medians. Each case returns a flat record."""

import statistics
import time
from collections.abc import Callable

from epd_ray.config import load_config
from epd_ray.distill import as_table
from epd_ray.prompts import load_prompts
from epd_ray.session import algorithm
from epd_ray.trainer import distil, held_out

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
# Ours where pictures are dear and waiting is not: explore widely, use each batch four times, never stale.
FEW_IMAGES = (
    "rdpo.concentration=10",
    "rdpo.lr=5e-4",
    "rdpo.epochs=4",
    "rdpo.clip=0.4",
    "rdpo.staleness=0",
)
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
        # 4 jobs on 2 actors, 4 drift calls of 60 ms each: 0.48 s; one head scores 4 jobs in 0.12 s each: 0.48 s.
        latencies = ("backbone.options={latency: 0.06}", "rewards.sim.options={latency: 0.12}")
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


def reference(seed: int = 0) -> Record:
    """Images that ours needs for the held-out reward that the reference's settings have after 3,200 images.

    Both start from the same distilled table and are judged on the same held-out prompts and seeds, which neither
    trains on. The reference: mixed baseline, own noise per image, its learning rate, batch and concentration. Ours:
    the settings in FEW_IMAGES.
    """
    ours = load_config(None, [f"seed={seed}", *FEW_IMAGES])
    theirs = load_config(None, [f"seed={seed}", *REFERENCE])
    prompts = load_prompts(ours.prompts, seed)
    with algorithm(theirs, prompts.train) as algo:
        fits = distil(ours, prompts, algo)
        algo.rebase(as_table(fits))
        start = held_out(ours, prompts, algo)
        while algo.policy_version * algo.config.images_per_iteration < REFERENCE_IMAGES:
            algo.train()
        target = held_out(ours, prompts, algo)
    curve = []
    with algorithm(ours, prompts.train, as_table(fits)) as algo:
        for _ in range(REFERENCE_IMAGES // algo.config.images_per_iteration):
            algo.train()
            curve.append(held_out(ours, prompts, algo))
            if curve[-1] >= target:
                break
        images = len(curve) * algo.config.images_per_iteration if curve[-1] >= target else None
    return {
        "seed": seed,
        "distilled_reward": start,
        "reference_reward": target,
        "reference_images": REFERENCE_IMAGES,
        "our_reward": curve[-1],
        "our_images": images,
        "ratio": None if images is None else images / REFERENCE_IMAGES,
    }


CASES: dict[str, Callable[[], Record]] = {"overhead": overhead, "overlap": overlap, "reference": reference}
