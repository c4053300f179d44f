"""Stage 1 by least squares: the table that comes closest to a finer solver. It needs no gradients of the network.

The weights enter the EPD step linearly. So for each interval, from the student's own state x, the drifts d_m are
evaluated at a grid of positions, and weights on K of them are found that come closest to the teacher's next state y:

    min_w || x + (b - a) sum_m w_m d_m - y ||^2  =  (b - a)^2 (w' G w - 2 w' c + |t|^2),   t = (y - x) / (b - a)

with G = D D' and c = D t. G and c are sums over prompts, so the worker of a shard returns only a matrix of a few dozen
numbers. The weights are at least a floor and add up to 1. Where direction scales are allowed, they are multiplied by
one scale o in [1 - S, 1 + S] per interval.

A history adds columns: the differences of the drift at the interval's start and the drifts at earlier starts. Their
weights have no bound, so they follow from the others: with G and c split into points (p) and history (h),

    h = G_hh^-1 (c_h - G_hp o w),

and the points' own problem is the one above with G_pp - G_ph G_hh^-1 G_hp and c_p - G_ph G_hh^-1 c_h.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar, nnls
from torch import Tensor

from epd_ray.solvers.interval import inner_sigma
from epd_ray.stage_one.shard import Fit, Interval, Points

Matrix = npt.NDArray[np.float64]
END_MARGIN = 0.02  # distance of the grid from 0 and 1, because a Dirichlet draws no position on its border
FREE_MARGIN = 0.003  # the same with a start point
RIDGE = 1e-9


@dataclass(frozen=True)
class NormalEquations:
    """The least-squares problem of one shard, or the sum over several.

    Attributes:
        gram: G, [M, M].
        cross: c, [M].
        target: the squared norm |t|^2.
        passes: the network passes that it took.
    """

    gram: Matrix
    cross: Matrix
    target: float
    passes: int = field(default=0, compare=False)

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(
            self.gram + other.gram, self.cross + other.cross, self.target + other.target, self.passes + other.passes
        )


@torch.no_grad()
def normal_equations(interval: Interval, grid: Sequence[float]) -> NormalEquations:
    """The least-squares problem of an interval, summed over its B prompts.

    The device holds one forward pass of B rows at a time. The CPU holds M * B drifts in float32, and the M drifts of
    one prompt in float64, a type that not every device has.

    Args:
        interval: the states of B prompts.
        grid: M positions to try, in [0, 1).
    """
    return _equations(interval, drifts_inside(interval, grid))


@torch.no_grad()
def equations_with_history(interval: Interval, positions: Sequence[float], depth: int) -> NormalEquations:
    """The same, with a column more for each earlier drift that there is, after those of the positions.

    Args:
        interval: the states of B prompts.
        positions: M positions, in [0, 1). A first one of 0 takes no evaluation where the drift there is known.
        depth: H, the largest number of earlier drifts.
    """
    now, *older = interval.drifts
    start = [now.cpu()] if interval.known and positions[0] == 0 else []
    inside = drifts_inside(interval, positions[len(start) :])
    return _equations(interval, [*start, *inside, *((now - d).cpu() for d in older[:depth])])


def _equations(interval: Interval, directions: Sequence[Tensor]) -> NormalEquations:
    """The least-squares problem in M directions [B, ...], which are on the CPU."""
    step = float(interval.sigmas[1] - interval.sigmas[0])
    wanted = ((interval.target - interval.x) / step).cpu()
    count = len(directions)
    total = NormalEquations(np.zeros((count, count)), np.zeros(count), 0.0)
    for row in range(len(wanted)):
        flat = torch.stack([d[row].flatten() for d in directions]).double()  # [M, L]
        goal = wanted[row].flatten().double()
        total = total + NormalEquations((flat @ flat.T).numpy(), (flat @ goal).numpy(), float(goal @ goal))
    return total


def drifts_inside(interval: Interval, grid: Sequence[float]) -> list[Tensor]:
    """The drifts at the M positions of the grid, each [B, ...] on the CPU; one call of the network per position."""
    (a, b), x = interval.sigmas.tolist(), interval.x
    found = []
    for r in grid:
        s = inner_sigma(a, b, r)
        found.append(interval.drift(x + (s - a) * interval.slope, x.new_full(x.shape[:1], s)).cpu())
    return found


def position_grid(count: int, start_point: bool = False) -> tuple[float, ...]:
    """`count` evenly spaced positions from 0.02 to 0.98; with a start point 0 and then `count` from 0.003 to 0.997."""
    margin = FREE_MARGIN if start_point else END_MARGIN
    grid: tuple[float, ...] = tuple(np.linspace(margin, 1 - margin, count).round(6).tolist())
    return (0.0, *grid) if start_point else grid


def best_points(
    equations: NormalEquations, grid: Sequence[float], points: int, min_weight: float, scale_range: float = 0.0
) -> Fit:
    """Try all combinations of K grid positions with their best weights, and return the one with the lowest residual.

    Args:
        equations: the sum over all shards.
        grid: M positions. If 0 is one of them, it is part of every combination: the start point.
        points: K, at most M.
        min_weight: smallest weight that a point may have, below 1 / K.
        scale_range: S in [0, 1). Above 0 the points come with a direction scale in [1 - S, 1 + S], the same for all K.
    """
    best: Fit | None = None
    start = [0] if grid[0] == 0 else []
    for chosen in combinations(range(len(start), len(grid)), points - len(start)):
        index = [*start, *chosen]
        gram, cross = equations.gram[np.ix_(index, index)], equations.cross[index]
        weights, scale = scaled_least_squares(gram, cross, min_weight, scale_range)
        moved = scale * weights
        residual = float(moved @ gram @ moved - 2 * moved @ cross + equations.target) / equations.target
        if best is None or residual < best.residual:
            scales = (scale,) * points if scale_range else None
            best = Fit(Points(tuple(grid[j] for j in index), tuple(weights.tolist()), scales), residual)
    assert best is not None
    return best


def best_with_history(
    equations: NormalEquations,
    positions: Sequence[float],
    points: int,
    min_weight: float,
    scale_range: float,
    depth: int,
) -> Fit:
    """The best points together with the weights of the earlier drifts.

    Args:
        equations: the sum over all shards, with the columns of `equations_with_history`.
        positions: see `best_points`, as are `points`, `min_weight` and `scale_range`.
        depth: H, the number of weights in the table; those without an earlier interval are 0.
    """
    count = len(positions)
    own, shared = equations.gram[:count, :count], equations.gram[:count, count:]
    free, wanted = equations.gram[count:, count:], equations.cross[count:]
    size = len(wanted)
    free = free + RIDGE * max(np.trace(free), 1e-300) * np.eye(size)
    solved, moved = np.linalg.solve(free, shared.T), np.linalg.solve(free, wanted)
    rest = max(equations.target - float(wanted @ moved), RIDGE * equations.target)
    left = NormalEquations(own - shared @ solved, equations.cross[:count] - shared @ moved, rest)
    fit = best_points(left, positions, points, min_weight, scale_range)
    index = [positions.index(r) for r in fit.points.positions]
    found, gram, cross = fit.points, left.gram[np.ix_(index, index)], left.cross[index]
    if points == 1 and scale_range:  # exactly, where a search for the scale comes near it
        scale = float(np.clip(cross[0] / gram[0, 0], 1 - scale_range, 1 + scale_range))
        found = replace(found, scale_dir=(scale,))
    steps = np.array(found.weights) * np.array(found.scale_dir or 1.0)
    history = moved - solved[:, index] @ steps
    distance = float(steps @ gram @ steps - 2 * steps @ cross) + left.target
    weights = (*history.tolist(), *[0.0] * (depth - size)) if depth else None
    return Fit(replace(found, history=weights), distance / equations.target, equations.passes)


def scaled_least_squares(gram: Matrix, cross: Matrix, min_weight: float, scale_range: float) -> tuple[Matrix, float]:
    """Minimise o^2 w'Gw - 2 o w'c over weights w and a scale o in [1 - scale_range, 1 + scale_range]; returns w and o.

    The weights are those of `simplex_least_squares`. The problem is convex in the product o w, so its minimum over w is
    convex in o.
    """

    def weights(scale: float) -> Matrix:
        return simplex_least_squares(gram, cross / scale, min_weight)

    def objective(scale: float) -> float:
        moved = scale * weights(scale)
        return float(moved @ gram @ moved - 2 * moved @ cross)

    if not scale_range:
        return weights(1.0), 1.0
    found = minimize_scalar(objective, bounds=(1 - scale_range, 1 + scale_range), method="bounded")
    return weights(found.x), float(found.x)


def simplex_least_squares(gram: Matrix, cross: Matrix, min_weight: float) -> Matrix:
    """Minimise w'Gw - 2w'c over weights w of at least `min_weight` that sum to 1.

    With the floor subtracted, this is a non-negative least-squares problem in which one heavily weighted row stands for
    the condition on the sum.
    """
    size = len(cross)
    room = 1 - size * min_weight
    floor = np.full(size, min_weight)
    scale = np.trace(gram) / size
    root = np.linalg.cholesky(gram + RIDGE * scale * np.eye(size)).T
    target = np.linalg.solve(root.T, cross - gram @ floor)
    heavy = 1e4 * np.sqrt(scale)
    free, _ = nnls(np.vstack([root, np.full((1, size), heavy)]), np.append(target, heavy * room))
    weights = floor + free
    return np.asarray(weights / weights.sum())
