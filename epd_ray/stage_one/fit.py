"""Stage 1 over all intervals: the tasks that go to the workers, and the table that their answers make."""

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
"""work(method, arguments) calls a method of RolloutWorker once per tuple, on any worker; the answers are in order."""


@dataclass(frozen=True)
class StageOne:
    """What stage 1 fits. The student is the solver of the table, the teacher a solver with many small steps.

    Attributes:
        intervals: N.
        points: K, the number of points per interval.
        prompts: the prompts on which the student is compared with the teacher.
        noise_seeds: the seed of each prompt's initial noise.
        shard_size: number of prompts in a task; it does not depend on the number of workers.
        teacher_steps: DPM-Solver-2 steps of the teacher in each interval.
        grid: number of positions that least squares tries for a point.
        min_weight: smallest weight that a point may have.
        afs: whether the student's first drift is analytical.
        order: order of the student's multistep slope, 1 to 4.
        start_point: whether the first point of each interval is the interval's start.
        scale_range: S; direction scales lie in [1 - S, 1 + S]. 0 fits none.

    Raises:
        ConfigError: the grid makes more combinations of positions than least squares can try.
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
        """The tasks of the interval that comes after the fitted ones."""
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
    """Fit one interval after the other, each from the states that the intervals fitted before lead to.

    Args:
        work: runs tasks on the workers, see `Work`.
        stage: what is fitted.
        sigmas: the schedule, N + 1 values.
        descent: options of the gradient descent; None uses least squares alone.
        from_least_squares: whether the descent starts from the least-squares fit, or from evenly spaced points of equal
            weight.
        after_each: called with each interval's fit as soon as it is found.

    Returns:
        One fit per interval.
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
    """The least-squares fit of the next interval; without a point that moves, only the start's position is tried."""
    moving = stage.points > stage.start_point
    grid = position_grid(stage.grid if moving else 0, stage.start_point)
    equations = reduce(add, work("distill", [(shard, grid) for shard in shards]))
    return best_points(equations, grid, stage.points, stage.min_weight, stage.scale_range)


def losses(work: Work, stage: StageOne, fits: Sequence[Fit]) -> list[Loss]:
    """The distance between student and teacher at the end of each interval, on the prompts of a stage."""
    found = []
    for i, fit in enumerate(fits):
        shards = stage.shards(fits[:i])
        found.append(reduce(add, _evaluate(work, shards)(fit.points, range(len(shards)), False)))
    return found


def _evaluate(work: Work, shards: Sequence[Shard]) -> Callable[[Points, Sequence[int], bool], list[Loss]]:
    def evaluate(points: Points, chosen: Sequence[int], gradient: bool) -> list[Loss]:
        return work("distill_loss", [(shards[i], points, gradient) for i in chosen])

    return evaluate
