"""Stage 1: the table that follows a finer solver best, by least squares. Inference only, any backbone size.

The weights enter the EPD step linearly. So per interval, from the student's own state x, take the drifts d_m at a
grid of positions, and find the simplex weights on K of them that come nearest the teacher's next state y:

    min_w || x + (b - a) sum_m w_m d_m - y ||^2  =  (b - a)^2 (w' G w - 2 w' c + |t|^2),   t = (y - x) / (b - a)

with G = D D' and c = D t. G and c are sums over prompts, so every shard sends back a matrix of a few dozen numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import Tensor

from epd_ray.sampling import conditioned_drift, noises
from epd_ray.solvers import SolverTable, dpm2, epd
from epd_ray.types import Backbone, Drift

Matrix = npt.NDArray[np.float64]
END_MARGIN = 0.02  # positions keep this distance from 0 and 1: a Dirichlet cannot sit on its border
RIDGE = 1e-9


@dataclass(frozen=True)
class DistillTask:
    """One interval of one shard.

    Attributes:
        intervals: N of the whole schedule.
        positions: the intervals fitted so far, [n][K].
        weights: likewise.
        grid: positions to try, M increasing values in (0, 1).
        teacher_steps: DPM-Solver-2 steps of the teacher per interval.
        prompts: of the shard.
        noise_seeds: one per prompt.
    """

    intervals: int
    positions: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    grid: tuple[float, ...]
    teacher_steps: int
    prompts: tuple[str, ...]
    noise_seeds: tuple[int, ...]


@dataclass(frozen=True)
class NormalEquations:
    """What a shard adds: G [M, M], c [M], and the target's squared norm."""

    gram: Matrix
    cross: Matrix
    target: float

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(self.gram + other.gram, self.cross + other.cross, self.target + other.target)


class Distiller:
    """A shard's share of the work; keeps the teacher's states between intervals and remakes them when it has none.

    Args:
        backbone: the frozen model.
        guidance_scale: for student and teacher.
    """

    def __init__(self, backbone: Backbone, guidance_scale: float) -> None:
        self.backbone, self.guidance_scale = backbone, guidance_scale
        self._teacher: dict[tuple[object, ...], list[Tensor]] = {}

    def normal_equations(self, task: DistillTask) -> NormalEquations:
        """The least-squares problem of the interval after those that the task has tables for."""
        i = len(task.positions)
        conditioning = self.backbone.encode(task.prompts, self.guidance_scale)
        drift = conditioned_drift(self.backbone, conditioning)
        sigmas = self.backbone.sigmas(task.intervals)
        start = self.backbone.initial(noises(self.backbone, task.noise_seeds))
        target = self._teacher_states(task, drift, start, sigmas)[i]
        x = start
        if i:
            fitted = SolverTable(torch.tensor(task.positions), torch.tensor(task.weights))
            x = epd(drift, start, sigmas[: i + 1], fitted)
        directions = drifts_inside(drift, x, float(sigmas[i]), float(sigmas[i + 1]), task.grid)  # [M, B, ...]
        step = float(sigmas[i + 1] - sigmas[i])
        flat = directions.flatten(1).cpu().double()  # on the CPU: some devices have no float64
        wanted = ((target - x) / step).flatten().cpu().double()
        return NormalEquations((flat @ flat.T).numpy(), (flat @ wanted).numpy(), float(wanted @ wanted))

    def _teacher_states(self, task: DistillTask, drift: Drift, start: Tensor, sigmas: Tensor) -> list[Tensor]:
        """The teacher's state at the end of each interval."""
        key = (task.intervals, task.teacher_steps, task.prompts, task.noise_seeds)
        if key not in self._teacher:
            states: list[Tensor] = []
            fine = refine(sigmas, task.teacher_steps)

            def keep(step: int, sigma: float, x: Tensor) -> None:
                if (step + 1) % task.teacher_steps == 0:
                    states.append(x)

            dpm2(drift, start, fine, callback=keep)
            self._teacher = {key: states}  # one shard at a time: latents of one job
        return self._teacher[key]


def refine(sigmas: Tensor, steps: int) -> Tensor:
    """Each interval of sigmas [N+1] in `steps` equal parts; [N * steps + 1]."""
    parts = torch.linspace(0, 1, steps + 1, dtype=sigmas.dtype)[:-1]
    inner = sigmas[:-1, None] + (sigmas[1:] - sigmas[:-1])[:, None] * parts
    return torch.cat([inner.flatten(), sigmas[-1:]])


def drifts_inside(drift: Drift, x: Tensor, a: float, b: float, grid: Sequence[float]) -> Tensor:
    """The drifts of the EPD points at each position of the grid, [M, B, ...]; one position a call bounds the memory."""
    d = drift(x, x.new_full(x.shape[:1], a))
    found = []
    for r in grid:
        s = b**r * a ** (1 - r)
        found.append(drift(x + (s - a) * d, x.new_full(x.shape[:1], s)))
    return torch.stack(found)


def position_grid(count: int) -> tuple[float, ...]:
    """`count` positions from 0.02 to 0.98."""
    return tuple(np.linspace(END_MARGIN, 1 - END_MARGIN, count).round(6).tolist())


@dataclass(frozen=True)
class Fit:
    """The best K points of an interval.

    Attributes:
        positions: [K], increasing.
        weights: [K], at least `min_weight`, summing to 1.
        residual: relative squared distance that is left, in units of the teacher's step.
    """

    positions: tuple[float, ...]
    weights: tuple[float, ...]
    residual: float


def as_table(fits: Sequence[Fit]) -> SolverTable:
    """The table of one fit per interval."""
    positions = torch.tensor([f.positions for f in fits], dtype=torch.float64)
    return SolverTable(positions, torch.tensor([f.weights for f in fits], dtype=torch.float64))


def best_points(equations: NormalEquations, grid: Sequence[float], points: int, min_weight: float) -> Fit:
    """Try every K of the grid's positions with their best simplex weights.

    Args:
        equations: summed over all shards.
        grid: M positions.
        points: K, at most M.
        min_weight: lower bound of each weight, below 1 / K.
    """
    best: Fit | None = None
    for chosen in combinations(range(len(grid)), points):
        index = list(chosen)
        gram, cross = equations.gram[np.ix_(index, index)], equations.cross[index]
        weights = simplex_least_squares(gram, cross, min_weight)
        residual = float(weights @ gram @ weights - 2 * weights @ cross + equations.target) / equations.target
        if best is None or residual < best.residual:
            best = Fit(tuple(grid[j] for j in index), tuple(weights.tolist()), residual)
    assert best is not None
    return best


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
