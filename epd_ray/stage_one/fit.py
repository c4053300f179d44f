"""Stage 1 over all intervals: the tasks that go to the workers, and the table that their answers make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any, Literal

import torch

from epd_ray.errors import ConfigError
from epd_ray.stage_one.combinations import too_many_combinations
from epd_ray.stage_one.gradient import Descent, Loss, descend
from epd_ray.stage_one.grid import best_path, interval_costs, shares_at
from epd_ray.stage_one.least_squares import best_points, best_with_history, position_grid
from epd_ray.stage_one.reuse import best_reuse
from epd_ray.stage_one.shard import Fit, Parts, Points, Shard
from epd_ray.stage_one.teacher import refine

GUIDANCE_FACTORS = tuple(round(0.1 * i, 1) for i in range(1, 21))
"""What the excess of the run's guidance scale over 1 is multiplied by, in the scales that an interval tries."""

StageOneMethod = Literal["distill", "distill_loss", "distill_whole", "distill_grid", "distill_changes"]
"""The methods of RolloutWorker that stage 1 calls."""
Work = Callable[[StageOneMethod, Sequence[tuple[Any, ...]]], list[Any]]
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
        noise_levels: whether the ends of the intervals are chosen too, among the teacher's sigmas.
        parts: what the table has beside its points.
        reuse_count: how many further intervals shall reuse the difference that the prompt makes; which ones is chosen.
        guidance_scale: the guidance scale of the run; above 1 where an interval's own is fitted or one reuses.

    Raises:
        ConfigError: the grid makes more combinations of positions than least squares can try, or a part of the table
            that cannot be fitted.
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
    noise_levels: bool = False
    parts: Parts = field(default_factory=Parts)
    reuse_count: int = 0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        problems = [too_many_combinations(self.grid, self.points, self.start_point)]
        if self.noise_levels and self.teacher_steps == 1 and not self.parts.places:
            problems.append(
                "teacher_steps is 1, at least 2 is needed to choose noise levels: two of them would meet "
                "(set distill.teacher_steps to 2 or more, or solver.grid=false)"
            )
        if self.parts.history >= self.intervals:
            problems.append(
                f"history is {self.parts.history}, below {self.intervals} is needed, the number of intervals "
                "(lower solver.history)"
            )
        if (self.parts.guides or self.reuse_count) and self.guidance_scale <= 1:
            problems.append(
                f"guidance_scale is {self.guidance_scale:g}, above 1 is needed to learn guidance or to reuse what it "
                "changes (set backbone.guidance_scale, or solver.guidance=false and solver.reuse=0)"
            )
        if found := [problem for problem in problems if problem]:
            raise ConfigError(found)

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
                self.parts,
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
    begin: Callable[[str, int], None] = lambda name, steps: None,
    after_each: Callable[[Fit | None], None] = lambda fit: None,
) -> list[Fit]:
    """Fit one interval after the other, each from the states that the intervals fitted before lead to.

    Where the noise levels are chosen, that comes first. Where intervals that reuse are chosen, the table is fitted
    without them, they are chosen along its states, and the table is fitted again with them in place.

    Args:
        work: runs tasks on the workers, see `Work`.
        stage: what is fitted.
        sigmas: the model's schedule, N + 1 values.
        descent: options of the gradient descent; None uses least squares alone.
        from_least_squares: whether the descent starts from the least-squares fit, or from evenly spaced points of equal
            weight.
        begin: called with the name of each part of the work and the number of its steps, before it.
        after_each: called after each step, with an interval's fit if it found one.

    Returns:
        One fit per interval. The passes that were not made for one interval are those of the first.
    """
    passes, shares = 0, None
    if stage.noise_levels:
        begin("choosing noise levels", 1)
        stage, sigmas, shares, passes = _choose_levels(work, stage, sigmas)
        after_each(None)
    for further in (stage.reuse_count, 0):
        begin("distilling", stage.intervals)
        fits: list[Fit] = []
        for i in range(stage.intervals):
            ends = (sigmas[i], sigmas[i + 1])
            fits.append(_fit_interval(work, stage, fits, ends, descent, from_least_squares))
            after_each(fits[-1])
        if not further:
            break
        passes += sum(fit.passes for fit in fits)
        begin("choosing passes to leave out", 1)
        stage, more = _choose_reuse(work, stage, fits, sigmas)
        passes += more
        after_each(None)
    if shares is not None:
        fits = [replace(f, points=replace(f.points, share=s)) for f, s in zip(fits, shares, strict=True)]
    return [replace(fits[0], passes=fits[0].passes + passes), *fits[1:]]


def _fit_interval(
    work: Work,
    stage: StageOne,
    fitted: Sequence[Fit],
    ends: tuple[float, float],
    descent: Descent | None,
    from_least_squares: bool,
) -> Fit:
    shards = stage.shards(fitted)
    fit = Fit(_evenly_spaced(stage.points, stage.start_point), float("nan"))
    if descent is None or from_least_squares:
        whole = stage.parts.history or stage.parts.guides
        fit = whole_least_squares(work, stage, shards) if whole else least_squares(work, stage, shards)
    if descent is not None:
        start = fit
        found = descend(_evaluate(work, shards, start.points), len(shards), ends, start.points, descent)
        points = replace(found.points, history=start.points.history, guidance=start.points.guidance)
        fit = Fit(points, found.residual, start.passes + found.passes)
    return replace(fit, points=replace(fit.points, reuse=len(fitted) in stage.parts.reuse))


def _choose_levels(
    work: Work, stage: StageOne, sigmas: Sequence[float]
) -> tuple[StageOne, Sequence[float], list[float], int]:
    """The stage with its places on the teacher's fine grid, its sigmas and their shares, and the passes it took."""
    schedule = torch.tensor(sigmas, dtype=torch.float64)
    fine = refine(schedule, stage.teacher_steps)
    errors = reduce(add, work("distill_grid", [(shard,) for shard in stage.shards(())]))
    places = best_path(interval_costs(errors, fine.tolist(), stage.scale_range), stage.intervals)
    chosen = fine[list(places)]
    parts = replace(stage.parts, places=places)
    return replace(stage, parts=parts), chosen.tolist(), shares_at(schedule, chosen), errors.passes


def _choose_reuse(work: Work, stage: StageOne, fits: Sequence[Fit], sigmas: Sequence[float]) -> tuple[StageOne, int]:
    """The stage with the intervals that reuse, and the passes that it took to choose them."""
    followed = replace(stage, parts=replace(stage.parts, guidance=True))  # which keeps what the prompt changes
    found = reduce(add, work("distill_changes", [(shard,) for shard in followed.shards(fits)]))
    widths = [b - a for a, b in pairwise(sigmas)]
    scales = [fit.points.guidance or stage.guidance_scale for fit in fits]
    reuse = best_reuse(found.distance, widths, scales, stage.reuse_count)
    return replace(stage, parts=replace(stage.parts, reuse=reuse), reuse_count=0), found.passes


def _evenly_spaced(points: int, start_point: bool) -> Points:
    first, moving = (0.0,) * start_point, points - start_point
    return Points((*first, *((j + 1) / (moving + 1) for j in range(moving))), (1 / points,) * points)


def least_squares(work: Work, stage: StageOne, shards: Sequence[Shard]) -> Fit:
    """The least-squares fit of the next interval; without a point that moves, only the start's position is tried."""
    moving = stage.points > stage.start_point
    grid = position_grid(stage.grid if moving else 0, stage.start_point)
    equations = reduce(add, work("distill", [(shard, grid) for shard in shards]))
    fit = best_points(equations, grid, stage.points, stage.min_weight, stage.scale_range)
    return replace(fit, passes=equations.passes)


def whole_least_squares(work: Work, stage: StageOne, shards: Sequence[Shard]) -> Fit:
    """The least-squares fit of the next interval with the weights of earlier drifts and its guidance scale.

    The positions are found at the guidance scale of the run. At these positions each scale of GUIDANCE_FACTORS is then
    tried with its own best weights. With a single point at the interval's start that takes no network pass, because the
    drift at every scale follows from the parts that both passes gave.
    """
    tried: list[float | None] = [None]
    positions = position_grid(stage.grid if stage.points > stage.start_point else 0, stage.start_point)
    best = _best_of(work, stage, shards, positions, tried)
    if stage.parts.guidance:
        tried = [1 + (stage.guidance_scale - 1) * factor for factor in GUIDANCE_FACTORS]
        found = _best_of(work, stage, shards, best.points.positions, tried)
        best = replace(found, passes=best.passes + found.passes)
    return best


def _best_of(
    work: Work, stage: StageOne, shards: Sequence[Shard], positions: Sequence[float], scales: Sequence[float | None]
) -> Fit:
    answers = work("distill_whole", [(shard, positions, scales) for shard in shards])
    sums = [reduce(add, equations) for equations in zip(*answers, strict=True)]
    fits = [
        best_with_history(total, positions, stage.points, stage.min_weight, stage.scale_range, stage.parts.history)
        for total in sums
    ]
    index = min(range(len(fits)), key=lambda i: fits[i].residual)
    points = replace(fits[index].points, guidance=scales[index])
    return Fit(points, fits[index].residual, sum(total.passes for total in sums))


def losses(work: Work, stage: StageOne, fits: Sequence[Fit]) -> list[Loss]:
    """The distance between student and teacher at the end of each interval, on the prompts of a stage."""
    found = []
    for i, fit in enumerate(fits):
        shards = stage.shards(fits[:i])
        found.append(reduce(add, _evaluate(work, shards, fit.points)(fit.points, range(len(shards)), False)))
    return found


def _evaluate(work: Work, shards: Sequence[Shard], like: Points) -> Callable[[Points, Sequence[int], bool], list[Loss]]:
    """The losses of points that have the history and the guidance of others."""

    def evaluate(points: Points, chosen: Sequence[int], gradient: bool) -> list[Loss]:
        whole = replace(points, history=like.history, guidance=like.guidance)
        return work("distill_loss", [(shards[i], whole, gradient) for i in chosen])

    return evaluate
