"""`epd-ray train --dry-run`: whether the actors of a run fit the cluster, their memory, its images and its hours."""

import time
from collections.abc import Mapping, Sequence

import ray

from epd_ray.actors.beforehand import panel_of
from epd_ray.actors.cluster import Resources, require_room
from epd_ray.actors.configured import run_session
from epd_ray.config.run_config import RunConfig
from epd_ray.config.services import RewardConfig
from epd_ray.errors import PlacementError
from epd_ray.prompts.splits import PromptSplits, load_prompts
from epd_ray.rdpo.config import placement
from epd_ray.rdpo.session import algorithm, rdpo_config
from epd_ray.runs.estimate import Costs, Estimate, compared, estimate, validations
from epd_ray.runs.stage_one import given_solver
from epd_ray.telemetry.memory import Memory
from epd_ray.telemetry.progress import Observer, duration

ROOM_SECONDS = 5.0  # for nodes to join
WELL_USED = 0.8  # share of an iteration; below it, more actors would not help

Rows = list[tuple[str, ...]]


def dry_run(config: RunConfig, observer: Observer) -> list[str]:
    """Start one actor of each kind, measure a batch, and say what the whole run would take.

    Args:
        config: the configuration of the run; nothing is written to disk.
        observer: sees the progress.

    Returns:
        The lines to print. Where the actors of the run do not fit the cluster, they say so and show the measurements
        with one actor of each kind.

    Raises:
        PlacementError: one actor of each kind does not fit the cluster either. The error contains the placement.
        EpdRayError: the prompts, models or heads cannot be used.
    """
    prompts = load_prompts(config.prompts, config.seed, panel_of(config))
    given_solver(config)  # raises where the solver is missing, damaged or of another shape
    with run_session(config):
        lines = _placement(config)
        try:
            costs, memory = _measure(config, prompts, observer)
        except PlacementError as error:
            message = f"nothing was measured, because one actor of each kind has no room either: {error}"
            raise PlacementError("\n".join([*filter(None, lines), message])) from error
    lines += ["", *_memory(config, memory), "", *_images(config, prompts)]
    return [*lines, "", *_hours(config, costs, estimate(config, prompts, costs))]


def _measure(config: RunConfig, prompts: PromptSplits, observer: Observer) -> tuple[Costs, dict[str, Memory]]:
    few = {name: _single(reward) for name, reward in config.rewards.items()}
    one = {"rollout_actors": min(1, config.cluster.rollout_actors), "max_rollout_actors": None, "learner_actors": 0}
    small = config.model_copy(update={"rewards": few, "cluster": config.cluster.model_copy(update=one)})
    observer.stage("starting one actor of each kind", 1)
    begin = time.perf_counter()
    with algorithm(small, prompts.train, rows=prompts.rows) as algo:
        start = time.perf_counter() - begin
        observer.advance()
        observer.stage("measuring a batch", 1)
        first, second = algo.rehearse()
        observer.advance()
        warming = first.generate_seconds + first.score_seconds
        return Costs(start, second.generate_seconds, second.head_seconds, warming), algo.memory()


def _single(reward: RewardConfig) -> RewardConfig:
    one = {"replicas": min(1, reward.replicas), "min_replicas": None, "max_replicas": None}
    return reward.model_copy(update=one)


def _groups(config: RunConfig) -> dict[str, list[Resources]]:
    """Every kind of actor -> the resources that each of its actors asks for, with one kind per head."""
    built = rdpo_config(config, ["any"])
    kinds = {kind: bundles for kind, bundles in placement(built).items() if kind != "reward actors"}
    heads = {f"reward {name}": [spec.bundle] * spec.replicas for name, spec in built.reward_specs.items()}
    return {kind: bundles for kind, bundles in (kinds | heads).items() if bundles}


def _sum(groups: Mapping[str, Sequence[Resources]]) -> Resources:
    total: Resources = {}
    for bundle in (bundle for bundles in groups.values() for bundle in bundles):
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _placement(config: RunConfig) -> list[str]:
    groups = _groups(config)
    asked, there = _sum(groups), {k: v for k, v in ray.cluster_resources().items()}
    rows: Rows = [(kind, f"{len(b)} x", _amounts(b[0])) for kind, b in groups.items()]
    rows += [
        ("all actors together", "", _amounts(asked)),
        ("in the cluster", "", _amounts({k: there.get(k, 0) for k in asked})),
    ]
    try:
        require_room(groups, ROOM_SECONDS)
        verdict = "all actors fit the cluster"
    except PlacementError as error:
        verdict = f"the actors do not fit the cluster: {error}"
    return ["placement", *_aligned(rows), f"  {verdict}"]


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"


def _memory(config: RunConfig, memory: Mapping[str, Memory]) -> list[str]:
    counts = {"rollout": config.cluster.rollout_actors, "encoder": 1}
    rows: Rows = [("", "actors", "host, each", "GPU, each")]
    for name, used in memory.items():
        count = counts[name] if name in counts else config.rewards[name.removeprefix("reward ")].replicas
        gpu = "-" if used.device is None else f"{_gib(used.device)} of {_gib(used.device_total or 0)}"
        here = "driver, drawing" if name == "rollout" else f"driver, {name}"
        rows.append((f"{name} actor" if count else here, str(count or 1), _gib(used.host), gpu))
    return ["memory at its peak", *_aligned(rows)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _images(config: RunConfig, prompts: PromptSplits) -> list[str]:
    r = config.rdpo
    each, solvers, times = r.prompts_per_iteration * r.group_size, len(compared(config)), validations(config)
    counts = {
        "training": (r.iterations * each, f"{r.iterations} iterations x {each}"),
        "validation": (times * len(prompts.validation), f"{times} times {len(prompts.validation)} prompts"),
        "comparison": (solvers * len(prompts.test), f"{solvers} solvers x {len(prompts.test)} prompts"),
    }
    rows: Rows = [(name, f"{count:,}", how) for name, (count, how) in counts.items()]
    return ["images", *_aligned([*rows, ("all together", f"{sum(count for count, _ in counts.values()):,}", "")])]


def _hours(config: RunConfig, costs: Costs, found: Estimate) -> list[str]:
    size, total = config.cluster.images_per_job, _sum(_groups(config))
    batch: Rows = [("generation", f"{costs.generate:.2f} s", f"{costs.generate / size:.3g} s an image")]
    batch += [(f"reward {name}", f"{s:.2f} s", f"{s / size:.3g} s an image") for name, s in costs.score.items()]
    shares: Rows = [(name, f"{share:.0%}") for name, share in found.busy.items()]
    slowest = found.bottleneck
    more = "cluster.rollout_actors" if slowest == "generation" else f"{slowest.replace('reward ', 'rewards.')}.replicas"
    advice = f"the bottleneck is {slowest}: a higher {more} makes the run faster"
    if found.busy[slowest] < WELL_USED:
        advice = "the actors wait for updates: a higher rdpo.staleness or more images per iteration keep them busy"
    unit, amount = ("GPU-hours", total["GPU"]) if total.get("GPU") else ("core-hours", total.get("CPU", 0.0))
    hours = found.total / 3600
    return [
        f"a batch of {size} images (the first one, which warms the devices up, took {costs.first:.2f} s)",
        *_aligned(batch),
        "",
        "share of an iteration in which the actors work",
        *_aligned(shares),
        f"  {advice}",
        "",
        "estimate",
        *_aligned([(stage, duration(seconds)) for stage, seconds in found.stages.items()]),
        f"  all together {duration(found.total)}, {hours * amount:.3g} {unit} ({amount:g} x {hours:.3g} h)",
    ]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
