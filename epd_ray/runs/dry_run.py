"""What a run would take, before it: where its actors go, their memory, its images, and the hours, from one batch."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from epd_ray.actors.cluster import Resources, ray_session, require_room
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import RewardConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.errors import PlacementError
from epd_ray.evaluation.comparison import rivals
from epd_ray.prompts.splits import PromptSplits, load_prompts
from epd_ray.rdpo.config import placement, uniform_table
from epd_ray.rdpo.session import algorithm, rdpo_config
from epd_ray.runs.train import given_solver
from epd_ray.telemetry.memory import Memory
from epd_ray.telemetry.progress import Observer, duration

ROOM_SECONDS = 5.0
BACKWARD = 4  # evaluations that one costs with its gradient, the forward being run again on the way back
WELL_USED = 0.8

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Costs:
    """Seconds measured with one actor of each kind.

    Attributes:
        start: until the models were loaded.
        generate: of a batch of pictures.
        score: head -> of the same batch.
        first: of the batch before, which warmed the devices up, made and scored.
    """

    start: float
    generate: float
    score: Mapping[str, float]
    first: float


@dataclass(frozen=True)
class Estimate:
    """A run's seconds.

    Attributes:
        stages: stage -> wall-clock seconds.
        busy: generation or head -> the share of an iteration that its actors work.
    """

    stages: Mapping[str, float]
    busy: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.stages.values())

    @property
    def bottleneck(self) -> str:
        """What works most."""
        return max(self.busy, key=lambda stage: self.busy[stage])


def dry_run(config: RunConfig, observer: Observer) -> list[str]:
    """Start one actor of each kind, measure a batch, and say what the whole run would take.

    Args:
        config: of the run; nothing of it is written anywhere.
        observer: sees the progress.

    Returns:
        Lines to read. Where the cluster has no room they say so, and what was measured all the same.

    Raises:
        PlacementError: there is no room for one actor of each kind either; with the placement, line by line.
        EpdRayError: prompts, models or heads that cannot be used.
    """
    prompts = load_prompts(config.prompts, config.seed)
    given_solver(config)  # it is there, sound, and of the run's shape
    with ray_session(config.cluster.address, config.cluster.env):
        lines = _placement(config)
        try:
            costs, memory = _measure(config, prompts, observer)
        except PlacementError as error:
            message = f"nothing measured, one actor of each kind has no room either: {error}"
            raise PlacementError("\n".join([*filter(None, lines), message])) from error
    lines += ["", *_memory(config, memory), "", *_images(config, prompts)]
    return [*lines, "", *_hours(config, costs, estimate(config, prompts, costs))]


def _measure(config: RunConfig, prompts: PromptSplits, observer: Observer) -> tuple[Costs, dict[str, Memory]]:
    few = {name: _single(reward) for name, reward in config.rewards.items()}
    one = {"rollout_actors": min(1, config.cluster.rollout_actors), "max_rollout_actors": None, "learner_actors": 0}
    small = config.model_copy(update={"rewards": few, "cluster": config.cluster.model_copy(update=one)})
    observer.stage("starting one actor of each kind", 1)
    begin = time.perf_counter()
    with algorithm(small, prompts.train) as algo:
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


# -- arithmetic -------------------------------------------------------------------------------------------------------


def estimate(config: RunConfig, prompts: PromptSplits, costs: Costs) -> Estimate:
    """From one batch to the whole run; policy updates, the store and the report are not counted.

    Args:
        config: of the run.
        prompts: of the run.
        costs: of one batch.
    """
    per_iteration = _batches(config, config.rdpo.prompts_per_iteration * config.rdpo.group_size)
    busy = {"generation": costs.generate * per_iteration / _actors(config)}
    for name, seconds in costs.score.items():
        busy[f"reward {name}"] = seconds * per_iteration / _replicas(config, name)
    # Without enough iterations in flight, actors wait for the update that their next job needs.
    iteration = max(*busy.values(), _seconds(config, costs, per_iteration) / (config.rdpo.staleness + 1))
    ours = _ours(config).model_evals
    compared = [
        _seconds(config, costs, _batches(config, len(prompts.test)), sampler.model_evals / ours)
        for sampler in _compared(config)
    ]
    held_out = _batches(config, len(prompts.validation))
    stages = {
        "starting actors": costs.start,
        "distilling": _distilling(config, prompts, costs),
        "fine-tuning": iteration * config.rdpo.iterations,
        "validating": _seconds(config, costs, held_out) * _validations(config),
        "comparing": sum(compared),
    }
    return Estimate(stages, {name: seconds / iteration for name, seconds in busy.items()})


def _seconds(config: RunConfig, costs: Costs, batches: int, share: float = 1.0) -> float:
    """Until so many batches are made and scored, each scored while others are made.

    Args:
        config: of the run.
        costs: of one batch.
        batches: handed out together.
        share: of our solver's evaluations that the sampler needs.
    """
    one = costs.generate * share
    heads = [(seconds, _replicas(config, name)) for name, seconds in costs.score.items()]
    made = one * math.ceil(batches / _actors(config)) + max(costs.score.values())
    return max(made, *(one + seconds * math.ceil(batches / replicas) for seconds, replicas in heads))


def _distilling(config: RunConfig, prompts: PromptSplits, costs: Costs) -> float:
    d, s = config.distill, config.solver
    if d.table is not None or not d.enabled:
        return 0.0
    evaluation = costs.generate / _ours(config).model_evals
    shards = _batches(config, min(d.prompts, len(prompts.train)))
    # Per interval: the teacher, the grid, the slope; and the student's points in all but the last.
    start, n = int(s.start_point), s.intervals
    passes = n * (2 * d.teacher_steps + d.grid + start + 1) + (n - 1) * (s.points - start)
    seconds = passes * math.ceil(shards / _actors(config)) * evaluation
    if d.method == "gradient":
        batch = math.ceil(max(1, round(d.batch / config.cluster.images_per_job)) / _actors(config))
        seconds += s.intervals * d.steps * batch * BACKWARD * s.points * evaluation
    return seconds


def _actors(config: RunConfig) -> int:
    return max(1, config.cluster.rollout_actors)  # 0: the driver


def _replicas(config: RunConfig, head: str) -> int:
    return max(1, config.rewards[head].replicas)


def _batches(config: RunConfig, images: int) -> int:
    return math.ceil(images / config.cluster.images_per_job)


def _validations(config: RunConfig) -> int:
    """The start, every few iterations, and the end."""
    iterations, every = config.rdpo.iterations, config.evaluation.every
    return 1 + iterations // every + bool(iterations % every)


def _ours(config: RunConfig) -> Sampler:
    s = config.solver
    table = uniform_table(s.intervals, s.points, s.start_point)
    return Sampler("epd", s.intervals, "rdpo", "rdpo", table, s.afs, s.order)


def _compared(config: RunConfig) -> list[Sampler]:
    """Ours, the start's table, and the baselines."""
    ours = _ours(config)
    return [ours, ours, *rivals(config.evaluation.baselines, ours, config.evaluation.equal_evals)]


# -- words ------------------------------------------------------------------------------------------------------------


def _groups(config: RunConfig) -> dict[str, list[Resources]]:
    """Every kind of actor -> what each asks for, heads by name."""
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
        ("asked in all", "", _amounts(asked)),
        ("in the cluster", "", _amounts({k: there.get(k, 0) for k in asked})),
    ]
    try:
        require_room(groups, ROOM_SECONDS)
        verdict = "all of it fits"
    except PlacementError as error:
        verdict = f"it does not fit: {error}"
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
    each, compared, validations = r.prompts_per_iteration * r.group_size, len(_compared(config)), _validations(config)
    counts = {
        "training": (r.iterations * each, f"{r.iterations} iterations x {each}"),
        "validation": (validations * len(prompts.validation), f"{validations} times {len(prompts.validation)} prompts"),
        "comparison": (compared * len(prompts.test), f"{compared} solvers x {len(prompts.test)} prompts"),
    }
    rows: Rows = [(name, f"{count:,}", how) for name, (count, how) in counts.items()]
    return ["images", *_aligned([*rows, ("in all", f"{sum(count for count, _ in counts.values()):,}", "")])]


def _hours(config: RunConfig, costs: Costs, found: Estimate) -> list[str]:
    size, total = config.cluster.images_per_job, _sum(_groups(config))
    batch: Rows = [("generation", f"{costs.generate:.2f} s", f"{costs.generate / size:.3g} s an image")]
    batch += [(f"reward {name}", f"{s:.2f} s", f"{s / size:.3g} s an image") for name, s in costs.score.items()]
    shares: Rows = [(name, f"busy {share:.0%}") for name, share in found.busy.items()]
    slowest = found.bottleneck
    more = "cluster.rollout_actors" if slowest == "generation" else f"{slowest.replace('reward ', 'rewards.')}.replicas"
    advice = f"the bottleneck is {slowest}: more {more} make it faster"
    if found.busy[slowest] < WELL_USED:
        advice = "actors wait for the update: a higher rdpo.staleness or more images per iteration keep them busy"
    unit, amount = ("GPU-hours", total["GPU"]) if total.get("GPU") else ("core-hours", total.get("CPU", 0.0))
    hours = found.total / 3600
    return [
        f"a batch of {size} (the first one, cold: {costs.first:.2f} s)",
        *_aligned(batch),
        "",
        "an iteration's actors",
        *_aligned(shares),
        f"  {advice}",
        "",
        "estimate",
        *_aligned([(stage, duration(seconds)) for stage, seconds in found.stages.items()]),
        f"  in all {duration(found.total)}, {hours * amount:.3g} {unit} ({amount:g} x {hours:.3g} h)",
    ]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
