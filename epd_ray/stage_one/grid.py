"""The noise levels of the student: those of the teacher's fine grid between which single steps miss it least.

The cost of an interval from fine sigma i to j is the squared distance between the teacher's state at j and Euler's step
from the teacher's state at i, along the teacher's drift there, with the direction scale that suits this step best where
scales are fitted. It takes no evaluation beyond the teacher's own. The N intervals with the smallest total are found by
dynamic programming.

Source: GITS (arXiv 2405.11326) and OSS (arXiv 2503.21774), which choose sigmas along a teacher's path in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epd_ray.errors import ModelError, TableError
from epd_ray.stage_one.least_squares import Matrix
from epd_ray.stage_one.teacher import FinePath


@dataclass(frozen=True)
class LocalErrors:
    """What the costs of all intervals follow from, of one shard or summed over several. The fine grid has M steps.

    Attributes:
        drift: [M], the squared length of the teacher's drift at i.
        cross: [M, M+1], the product of the drift at i and the way x_j - x_i.
        way: [M, M+1], the squared length of the way x_j - x_i.
        passes: the network passes that it took.
    """

    drift: Matrix
    cross: Matrix
    way: Matrix
    passes: int = 0

    def __add__(self, other: "LocalErrors") -> "LocalErrors":
        return LocalErrors(
            self.drift + other.drift, self.cross + other.cross, self.way + other.way, self.passes + other.passes
        )


def local_errors(path: FinePath) -> LocalErrors:
    """The products that the costs are made of, summed over the B prompts of a path, in float64."""
    count = len(path.drifts)
    total = LocalErrors(np.zeros(count), np.zeros((count, count + 1)), np.zeros((count, count + 1)))
    for row in range(len(path.states[0])):
        states, drifts = (torch.stack([x[row].flatten() for x in kind]).double() for kind in (path.states, path.drifts))
        squares, products = states @ states.T, drifts @ states.T
        norms, own = squares.diagonal(), products.diagonal()
        way = norms[:-1, None] + norms[None] - 2 * squares[:-1]
        total = total + LocalErrors(
            drifts.square().sum(1).numpy(), (products - own[:, None]).numpy(), way.clamp_min(0).numpy()
        )
    return total


def interval_costs(errors: LocalErrors, sigmas: Sequence[float], scale_range: float = 0.0) -> Matrix:
    """The cost of each interval, [M+1, M+1]; infinite where j is not after i.

    Args:
        errors: the sum over all shards.
        sigmas: [M+1], the fine grid, decreasing.
        scale_range: S in [0, 1); the step is multiplied by its best scale in [1 - S, 1 + S].

    Raises:
        ModelError: an error is not finite, because the teacher's states are not.
    """
    if not all(np.isfinite(values).all() for values in (errors.drift, errors.cross, errors.way)):
        raise ModelError("the teacher's states are not finite: use dtype float32, or raise distill.teacher_steps")
    levels = np.asarray(sigmas, np.float64)
    width = levels[None] - levels[:-1, None]  # [M, M + 1]
    length, along = width**2 * errors.drift[:, None], width * errors.cross
    safe = np.where(length > 0, length, 1.0)
    scale = np.clip(np.where(length > 0, along / safe, 1.0), 1 - scale_range, 1 + scale_range)
    costs = np.full((len(levels), len(levels)), np.inf)
    costs[:-1] = np.maximum(errors.way - 2 * scale * along + scale**2 * length, 0.0)
    costs[np.tril_indices(len(levels))] = np.inf
    return costs


def best_path(costs: Matrix, steps: int) -> tuple[int, ...]:
    """The cheapest way from the first to the last of M + 1 places in a given number of steps.

    Args:
        costs: [M+1, M+1], the cost of a step from i to j; infinite where there is none.
        steps: N, from 1 to M.

    Returns:
        N + 1 places, increasing, from 0 to M.

    Raises:
        TableError: there are fewer places than steps, so that two ends would meet.
    """
    last = len(costs) - 1
    if not 1 <= steps <= last:
        raise TableError(f"{steps} intervals do not fit between {last + 1} noise levels: two of them would meet")
    total, chosen = costs[0], []
    for _ in range(steps - 1):
        through = total[:, None] + costs
        chosen.append(through.argmin(0))
        total = through.min(0)
    place, found = last, [last]
    for before in reversed(chosen):
        place = int(before[place])
        found.append(place)
    return (0, *reversed(found))


def shares_at(sigmas: Tensor, chosen: Tensor) -> list[float]:
    """The shares [N] of a schedule [N+1] that lead to the chosen sigmas [N+1], see `epd_ray.solvers.grid.regrid`."""
    logs, wanted = (v.double().log() for v in (sigmas, chosen))
    count = len(sigmas) - 1
    lower = (torch.searchsorted(-logs, -wanted, right=True) - 1).clamp(0, count - 1)
    places = lower + (logs[lower] - wanted) / (logs[lower] - logs[lower + 1])
    shares: list[float] = (places.diff() / count).tolist()
    return shares
