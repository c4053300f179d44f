"""Stage 1 over all intervals: which tasks go to the workers, and what becomes of their answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal

from epd_ray.errors import ConfigError
from epd_ray.stage_one.combinations import too_many_combinations
from epd_ray.stage_one.gradient import Descent, Loss, descend
from epd_ray.stage_one.least_squares import best_points, position_grid
from epd_ray.stage_one.shard import Fit, Points, Shard

Work = Callable[[Literal["distill", "distill_loss"], Sequence[tuple[Any, ...]]], list[Any]]
"""work(method, arguments): one call of RolloutWorker's method per tuple, anywhere; the answers in order."""


@dataclass(frozen=True)
class StageOne:
    """A table to fit, shard by shard.

    Attributes:
        intervals: N.
        points: K.
        prompts: to follow the teacher on.
        noise_seeds: one each.
        shard_size: prompts of a task, whatever the number of workers.
        teacher_steps: DPM-Solver-2 steps of the teacher per interval.
        grid: positions that least squares tries per interval.
        min_weight: smallest weight of a point.
        afs: analytical first step of the student.
        order: of the student's multistep slope.
        start_point: whether the first point is the interval's start.
        scale_range: of the direction scales; 0: none.

    Raises:
        ConfigError: a grid of more combinations than an interval's fit can try.
    """

    intervals: int
    points: int
    prompts: tuple[str, ...]
    noise_seeds: tuple[int, ...]
    shard_size: int
    teacher_steps: int
    grid: int
    min_weight: float
    afs: bool = False
    order: int = 1
    start_point: bool = False
    scale_range: float = 0.0

    def __post_init__(self) -> None:
        if problem := too_many_combinations(self.grid, self.points, self.start_point):
            raise ConfigError([problem])

    def shards(self, fitted: Sequence[Fit]) -> list[Shard]:
        """The tasks of the next interval."""
        so_far, size = tuple(fit.points for fit in fitted), self.shard_size
        return [
            Shard(
                self.prompts[i : i + size],
                self.noise_seeds[i : i + size],
                self.intervals,
                so_far,
                self.teacher_steps,
                self.afs,
                self.order,
            )
            for i in range(0, len(self.prompts), size)
        ]


def fit_table(
    work: Work,
    stage: StageOne,
    sigmas: Sequence[float],
    descent: Descent | None = None,
    *,
    from_least_squares: bool = True,
    after_each: Callable[[Fit], None] = lambda fit: None,
) -> list[Fit]:
    """One fit per interval, each from where the earlier ones lead.

    Args:
        work: runs tasks.
        stage: what is fitted.
        sigmas: N+1.
        descent: go on by gradient; None leaves it at least squares.
        from_least_squares: where the descent starts; else at evenly spaced points of equal weight.
        after_each: called with each interval's fit, as it is found.
    """
    fits: list[Fit] = []
    for i in range(stage.intervals):
        shards = stage.shards(fits)
        fit = Fit(_evenly_spaced(stage.points, stage.start_point), float("nan"))
        if descent is None or from_least_squares:
            fit = least_squares(work, stage, shards)
        if descent is not None:
            fit = descend(_evaluate(work, shards), len(shards), (sigmas[i], sigmas[i + 1]), fit.points, descent)
        fits.append(fit)
        after_each(fit)
    return fits


def _evenly_spaced(points: int, start_point: bool) -> Points:
    first, moving = (0.0,) * start_point, points - start_point
    return Points((*first, *((j + 1) / (moving + 1) for j in range(moving))), (1 / points,) * points)


def least_squares(work: Work, stage: StageOne, shards: Sequence[Shard]) -> Fit:
    """The next interval's fit; stage.grid positions are tried, where a point moves."""
    moving = stage.points > stage.start_point
    grid = position_grid(stage.grid if moving else 0, stage.start_point)
    equations = reduce(add, work("distill", [(shard, grid) for shard in shards]))
    return best_points(equations, grid, stage.points, stage.min_weight, stage.scale_range)


def losses(work: Work, stage: StageOne, fits: Sequence[Fit]) -> list[Loss]:
    """How far a table leads from the teacher, interval by interval, on the prompts of a stage."""
    found = []
    for i, fit in enumerate(fits):
        shards = stage.shards(fits[:i])
        found.append(reduce(add, _evaluate(work, shards)(fit.points, range(len(shards)), False)))
    return found


def _evaluate(work: Work, shards: Sequence[Shard]) -> Callable[[Points, Sequence[int], bool], list[Loss]]:
    def evaluate(points: Points, chosen: Sequence[int], gradient: bool) -> list[Loss]:
        return work("distill_loss", [(shards[i], points, gradient) for i in chosen])

    return evaluate
