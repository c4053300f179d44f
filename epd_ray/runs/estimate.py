"""From the seconds of one measured batch to the seconds of a whole run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.evaluation.comparison import opponents
from epd_ray.prompts.splits import PromptSplits
from epd_ray.solvers.table import uniform_table

BACKWARD = 4  # evaluations that cost as much as one with its gradient: the backward pass runs the forward again


@dataclass(frozen=True)
class Costs:
    """Seconds that one actor of each kind takes.

    Attributes:
        start: seconds until the models are loaded.
        generate: seconds to draw a batch of pictures.
        score: the name of each head -> the seconds to score the same batch.
        first: seconds to draw and score the first batch, which warms the devices up.
    """

    start: float
    generate: float
    score: Mapping[str, float]
    first: float


@dataclass(frozen=True)
class Estimate:
    """How long a run takes.

    Attributes:
        stages: the name of each stage -> its wall-clock seconds.
        busy: "generation" or "reward <head>" -> the share of an iteration in which its actors work, in [0, 1].
    """

    stages: Mapping[str, float]
    busy: Mapping[str, float]

    @property
    def total(self) -> float:
        """Wall-clock seconds of the run."""
        return sum(self.stages.values())

    @property
    def bottleneck(self) -> str:
        """The key of `busy` whose actors work the largest share of an iteration."""
        return max(self.busy, key=lambda stage: self.busy[stage])


def estimate(config: RunConfig, prompts: PromptSplits, costs: Costs) -> Estimate:
    """Estimate a run from one batch. Policy updates, writing to disk and the report are not counted.

    Args:
        config: the configuration of the run.
        prompts: the prompts of the three splits.
        costs: the seconds of one batch.
    """
    per_iteration = _batches(config, config.rdpo.prompts_per_iteration * config.rdpo.group_size)
    busy = {"generation": costs.generate * per_iteration / _actors(config)}
    for name, seconds in costs.score.items():
        busy[f"reward {name}"] = seconds * per_iteration / _replicas(config, name)
    # With too few iterations in progress the actors wait for the update that their next job needs.
    iteration = max(*busy.values(), _seconds(config, costs, per_iteration) / (config.rdpo.staleness + 1))
    ours = _ours(config).model_evals
    seconds_compared = [
        _seconds(config, costs, _batches(config, len(prompts.test)), sampler.model_evals / ours)
        for sampler in compared(config)
    ]
    held_out = _batches(config, len(prompts.validation))
    stages = {
        "starting actors": costs.start,
        "distilling": _distilling(config, prompts, costs),
        "fine-tuning": iteration * config.rdpo.iterations,
        "validating": _seconds(config, costs, held_out) * validations(config),
        **({"tuning rivals": _tuning(config, costs)} if config.evaluation.tune else {}),
        "comparing": sum(seconds_compared),
    }
    return Estimate(stages, {name: seconds / iteration for name, seconds in busy.items()})


def validations(config: RunConfig) -> int:
    """How often a run validates: at the start, every few iterations, and at the end."""
    iterations, every = config.rdpo.iterations, config.evaluation.every
    return 1 + iterations // every + bool(iterations % every)


def compared(config: RunConfig) -> list[Sampler]:
    """The samplers of the comparison: the run's solver, its start table, the reference, and the rivals.

    With tuning, each rival is drawn as it comes and as it was tuned.
    """
    ours = _ours(config)
    slow, *rivals = opponents(config.evaluation.baselines, ours, config.evaluation.equal_evals)
    return [ours, ours, slow, *(rivals * 2 if config.evaluation.tune else rivals)]


def _tuning(config: RunConfig, costs: Costs) -> float:
    """Seconds to tune the rivals, where each draws all of its pictures."""
    ours, images = _ours(config), config.evaluation.tune_images
    found = opponents(config.evaluation.baselines, ours, config.evaluation.equal_evals)
    pictures = {sampler.key: images for sampler in found} | {found[0].key: images // 2}
    return sum(
        _seconds(config, costs, _batches(config, pictures[s.key]), s.model_evals / ours.model_evals) for s in found
    )


def _seconds(config: RunConfig, costs: Costs, batches: int, share: float = 1.0) -> float:
    """Seconds until some batches are drawn and scored, where each is scored while the next ones are drawn.

    Args:
        config: the configuration of the run.
        costs: the seconds of one batch.
        batches: the number of batches, which are handed out together.
        share: the evaluations of the sampler, divided by those of the run's solver.
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
    # Each interval needs the teacher, the grid and the slope; all but the last also need the points of the student.
    start, n = int(s.start_point), s.intervals
    passes = n * (2 * d.teacher_steps + d.grid + start + 1) + (n - 1) * (s.points - start)
    seconds = passes * math.ceil(shards / _actors(config)) * evaluation
    if d.method == "gradient":
        batch = math.ceil(max(1, round(d.batch / config.cluster.images_per_job)) / _actors(config))
        seconds += s.intervals * d.steps * batch * BACKWARD * s.points * evaluation
    return seconds


def _actors(config: RunConfig) -> int:
    return max(1, config.cluster.rollout_actors)  # with 0 of them the driver draws


def _replicas(config: RunConfig, head: str) -> int:
    return max(1, config.rewards[head].replicas)


def _batches(config: RunConfig, images: int) -> int:
    return math.ceil(images / config.cluster.images_per_job)


def _ours(config: RunConfig) -> Sampler:
    s = config.solver
    table = uniform_table(s.intervals, s.points, s.start_point)
    return Sampler("epd", s.intervals, "rdpo", "rdpo", table, s.afs, s.order)
