"""Stage 1: the table that follows a finer solver best, by least squares. Inference only, any backbone size.

The weights enter the EPD step linearly. So per interval, from the student's own state x, take the drifts d_m at a
grid of positions, and find the simplex weights on K of them that come nearest the teacher's next state y:

    min_w || x + (b - a) sum_m w_m d_m - y ||^2  =  (b - a)^2 (w' G w - 2 w' c + |t|^2),   t = (y - x) / (b - a)

with G = D D' and c = D t. G and c are sums over prompts, so every shard sends back a matrix of a few dozen numbers.
Where direction scales are allowed, w is o times such weights, one o in [1 - S, 1 + S] for the interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar, nnls
from torch import Tensor

from epd_ray.solvers.interval import inner_sigma
from epd_ray.stage_one.shard import Fit, Interval, Points

Matrix = npt.NDArray[np.float64]
END_MARGIN = 0.02  # positions keep this distance from 0, 1 and each other: a Dirichlet cannot sit on its border
FREE_MARGIN = 0.003  # beside a start point, which is not drawn
RIDGE = 1e-9


@dataclass(frozen=True)
class NormalEquations:
    """What a shard adds: G [M, M], c [M], and the target's squared norm."""

    gram: Matrix
    cross: Matrix
    target: float

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(self.gram + other.gram, self.cross + other.cross, self.target + other.target)


@torch.no_grad()
def normal_equations(interval: Interval, grid: Sequence[float]) -> NormalEquations:
    """The least-squares problem of an interval, summed over its B prompts.

    The device holds one forward of B rows at a time. The CPU holds the drifts, 4 bytes for each of M * B latents, and
    one prompt's in float64 (not every device has it).

    Args:
        interval: B prompts.
        grid: M positions to try, in [0, 1).
    """
    directions = drifts_inside(interval, grid)  # M of [B, ...]
    step = float(interval.sigmas[1] - interval.sigmas[0])
    wanted = ((interval.target - interval.x) / step).cpu()
    total = NormalEquations(np.zeros((len(grid), len(grid))), np.zeros(len(grid)), 0.0)
    for row in range(len(wanted)):
        flat = torch.stack([d[row].flatten() for d in directions]).double()  # [M, L]
        goal = wanted[row].flatten().double()
        total = total + NormalEquations((flat @ flat.T).numpy(), (flat @ goal).numpy(), float(goal @ goal))
    return total


def drifts_inside(interval: Interval, grid: Sequence[float]) -> list[Tensor]:
    """The drifts of the EPD points at each position of the grid, M of [B, ...] on the CPU, one position a call."""
    (a, b), x = interval.sigmas.tolist(), interval.x
    found = []
    for r in grid:
        s = inner_sigma(a, b, r)
        found.append(interval.drift(x + (s - a) * interval.slope, x.new_full(x.shape[:1], s)).cpu())
    return found


def position_grid(count: int, start_point: bool = False) -> tuple[float, ...]:
    """`count` positions from 0.02 to 0.98; with a start point 0, then `count` from 0.003 to 0.997."""
    margin = FREE_MARGIN if start_point else END_MARGIN
    grid: tuple[float, ...] = tuple(np.linspace(margin, 1 - margin, count).round(6).tolist())
    return (0.0, *grid) if start_point else grid


def best_points(
    equations: NormalEquations, grid: Sequence[float], points: int, min_weight: float, scale_range: float = 0.0
) -> Fit:
    """Try every K of the grid's positions with their best simplex weights; where 0 is on the grid, it is one of them.

    Args:
        equations: summed over all shards.
        grid: M positions.
        points: K, at most M.
        min_weight: lower bound of each weight, below 1 / K.
        scale_range: S in [0, 1); above 0 the points come with direction scales, the same for all K.
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


def scaled_least_squares(gram: Matrix, cross: Matrix, min_weight: float, scale_range: float) -> tuple[Matrix, float]:
    """min o^2 w'Gw - 2 o w'c over simplex weights w as below, and o in [1 - scale_range, 1 + scale_range]; w and o.

    In o w the problem is convex, hence what is left of it in o is too.
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
    """min w'Gw - 2w'c over weights of at least `min_weight` that sum to 1.

    The floor is shifted out and the sum becomes one heavy row of a non-negative least-squares problem.
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
