"""The noise levels that a table's own grid makes of a sigma schedule."""

import torch
from torch import Tensor

from epd_ray.solvers.table import SolverTable


def regrid(sigmas: Tensor, shares: Tensor) -> Tensor:
    """Move the sigmas of a schedule between its ends, so that each interval takes its share of the schedule.

    The schedule is the axis: its sigmas [N+1] stand at 0, 1 / N, ..., 1, and between them log sigma is linear. Equal
    shares give the schedule itself.

    Args:
        sigmas: [N+1], decreasing, > 0.
        shares: [N] or [B, N], > 0, with sum 1.

    Returns:
        [N+1] or [B, N+1], float64, decreasing, with the ends of `sigmas`.
    """
    count = len(sigmas) - 1
    logs = sigmas.double().log()
    places = shares.double().to(logs.device).cumsum(-1)[..., :-1] * count  # of the inner sigmas, in intervals
    lower = places.floor().clamp(0, count - 1).long()
    inner = torch.lerp(logs[lower], logs[lower + 1], places - lower).exp()
    first, last = (sigmas[i].double().expand(*shares.shape[:-1], 1) for i in (0, -1))
    return torch.cat([first, inner, last], -1)


def levels(table: SolverTable, sigmas: Tensor) -> Tensor:
    """The sigmas that a table is run on: `sigmas` [N+1] themselves without a grid, else those of `regrid`."""
    return sigmas if table.grid is None else regrid(sigmas, table.grid)
