"""The EPD step: evaluate the drift at an interval's start, then at K points inside it at once, and average the K."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from epd_ray.errors import ScheduleError, TableError, shown
from epd_ray.solvers.grid import levels
from epd_ray.solvers.interval import FLOW_SIGMA_MAX, inner_sigma
from epd_ray.solvers.schedules import check_sigmas
from epd_ray.solvers.table import SolverTable
from epd_ray.types import Drift, Form, GuidableDrift

Callback = Callable[[int, float, Tensor], None]
"""Called as callback(step_index, sigma_next, x) after each interval."""

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Coefficients of the stored drifts, newest first, by the number of drifts."""
ROUNDING = 1e-6  # by which a time scale that was rounded to float32 may lead above the largest sigma


def epd(
    drift: Drift,
    x: Tensor,
    sigmas: Tensor,
    table: SolverTable,
    *,
    afs: bool = False,
    order: int = 1,
    form: Form | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Solve the probability-flow ODE with a table; the K drifts of an interval are one batched call.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]). Its second call in an interval has B * K rows, row
            b * K + k for point k of sample b. If the table has a start point, that call has B * (K - 1) rows, because
            the drift at the start is known from the first call; with K = 1 there is no second call.
        x: [B, ...], the state at sigmas[0]. The whole computation has its dtype.
        sigmas: [N+1], decreasing, > 0.
        table: N intervals, one table for all samples or one per sample.
        afs: whether the first drift is analytical, which saves one evaluation (see `analytic_drift`); needs `form`.
        order: order of the multistep slope that leads from the start to the points, 1 to 4. Above 1 the solver is the
            EPD-Plugin on iPNDM.
        form: how noise enters x. For "flow", a scale_time that leads above sigma 1 is refused.
        callback: see `Callback`.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or reach 0.
        TableError: a table that does not fit sigmas, x or form; an order outside 1 to 4; afs without form.

    Source: EPD-Solver (arXiv 2507.14797), and its EPD-Plugin.
    """
    check_options(table, sigmas, afs=afs, order=order, form=form)
    batch = x.shape[0]
    if table.batch not in (None, batch):
        raise TableError(f"the table is for {table.batch} samples, but x has {batch} (pass one row per sample)")
    points = [values.to(x) for values in stages(table, sigmas)]  # each [B or 1, N, K]
    weights = None if table.history is None else table.history.reshape(-1, table.intervals, table.history.shape[-1])
    grid = levels(table, sigmas)
    shared = grid.ndim == 1
    ends = grid.tolist() if shared else grid.to(x).unbind(1)
    history: deque[Tensor] = deque(maxlen=max(order, table.depth))
    for i, (a, b) in enumerate(pairwise(ends)):
        here = _guided(drift, table, i)
        sigma = x.new_full((batch,), a) if shared else a
        first = analytic_drift(x, a if shared else spread(a[:, None], x[:, None]), form) if afs and i == 0 else None
        history.appendleft(here(x, sigma) if first is None else first)
        width = b - a if shared else (b - a).reshape(-1, *[1] * (x.ndim - 1))
        past = None if weights is None else weights[:, i].to(x)
        x = epd_step(here, x, history, width, tuple(c[:, i] for c in points), table.known_points(i, afs), order, past)
        if callback is not None:
            callback(i, b if shared else float(b.mean()), x)
    return x


def _guided(drift: Drift, table: SolverTable, interval: int) -> Drift:
    """The drift at the guidance that the table sets for an interval; the drift itself where it sets none."""
    if not table.guides:
        return drift
    if not isinstance(drift, GuidableDrift):
        raise TableError("the table sets guidance, but this drift has none: take its parts guidance and reuse out")
    scale = None if table.guidance is None else table.guidance[..., interval]
    return drift.at(scale, interval in table.reused)


def epd_step(
    drift: Drift,
    x: Tensor,
    history: Sequence[Tensor],
    width: float | Tensor,
    points: tuple[Tensor, ...],
    known: int,
    order: int = 4,
    past: Tensor | None = None,
) -> Tensor:
    """One interval of `epd` after the drift at its start; the drift is called once, for all points not known yet.

    Args:
        drift: see `epd`.
        x: [B, ...], the state at the interval's start.
        history: drifts at this start and at the starts before it, newest first, as many as there are.
        width: sigma at its end minus sigma at its start, one for all samples or [B, 1, ...].
        points: the interval's rows of the three results of `stages`, each [B or 1, K], in the dtype of x.
        known: how many of the first points need no evaluation, see `SolverTable.known_points`.
        order: how many drifts the slope towards the points combines at most.
        past: the interval's row of the table's history, [B or 1, H]; None: none.

    Returns:
        The state at the interval's end, [B, ...].
    """
    inner, offsets, gains = points
    slope = multistep([*history][:order]).unsqueeze(1)  # [B, 1, ...]
    parts = [history[0].unsqueeze(1)] if known else []
    if known < inner.shape[-1]:
        x_k = x.unsqueeze(1) + spread(offsets[:, known:], slope) * slope  # [B, K - known, ...]
        sigma_k = inner[:, known:].expand(len(x), -1)  # [B, K - known]
        parts.append(drift(x_k.flatten(0, 1), sigma_k.flatten()).reshape(x_k.shape))
    d_k = torch.cat(parts, 1)  # [B, K, ...]
    total = (spread(gains, d_k) * d_k).sum(1)
    if past is not None and len(history) > 1:
        older = torch.stack([history[0] - d for d in [*history][1 : past.shape[-1] + 1]], 1)  # [B, h, ...]
        total = total + (spread(past[:, : older.shape[1]], older) * older).sum(1)
    return x + width * total


def check_options(table: SolverTable, sigmas: Tensor, *, afs: bool, order: int, form: Form | None) -> None:
    """Refuse a combination that `epd` cannot run.

    Args:
        table: N intervals.
        sigmas: [N+1].
        afs: whether the first drift is analytical.
        order: order of the multistep slope.
        form: how noise enters x; None where it is unknown.

    Raises:
        ScheduleError: sigmas that do not decrease, reach 0, or start above 1 in flow form.
        TableError: a table, order or form that is wrong or does not fit the rest.
    """
    check_sigmas(sigmas)
    if table.intervals != len(sigmas) - 1:
        raise TableError(f"the table has {table.intervals} intervals, but {len(sigmas)} sigmas make {len(sigmas) - 1}")
    check_order(order)
    if form not in (None, "ve", "flow"):
        raise TableError(f"form is {shown(form)}, expected 've', 'flow' or None")
    if afs and form is None:
        raise TableError("afs needs form='ve' or form='flow': the analytical first step differs between them")
    if form == "flow" and sigmas[0] > FLOW_SIGMA_MAX:
        raise ScheduleError(f"sigmas[0] is {sigmas[0].item():g}, expected at most {FLOW_SIGMA_MAX:g} for a flow model")
    if form == "flow" and table.scale_time is not None:
        inner = stages(table, sigmas)[0].reshape(-1, table.points)  # [B * N, K]
        beyond = (inner > FLOW_SIGMA_MAX + ROUNDING).nonzero()
        if len(beyond):
            row, k = beyond[0].tolist()
            index = [row, k] if table.batch is None else [*divmod(row, table.intervals), k]
            value = table.scale_time[tuple(index)].item()
            raise TableError(
                f"scale_time{index} is {value:.6g}, which evaluates at sigma {inner[row, k].item():.6g}, "
                f"expected at most {FLOW_SIGMA_MAX:g} for a flow model (lower it, or raise the position)"
            )


def check_order(order: int) -> None:
    """Refuse an order that the multistep slope does not have.

    Raises:
        TableError: an order outside 1 to 4.
    """
    if order not in ADAMS_BASHFORTH:
        raise TableError(f"order is {order}, expected 1, 2, 3 or 4")


def analytic_drift(x: Tensor, sigma: float | Tensor, form: Form | None) -> Tensor:
    """An estimate of the first drift without the network.

    In VE form it is the drift of data distributed as a unit Gaussian, in flow form that of a denoiser that returns 0.

    Args:
        x: [B, ...], the state at sigma.
        sigma: > 0, one for all samples or a tensor [B, 1, ...].
        form: how noise enters x, "ve" or "flow".

    Returns:
        dx/dsigma, shape of x.

    Source: AFS (arXiv 2210.05475).
    """
    return x / (1 + sigma**2) ** 0.5 if form == "ve" else x / sigma


def multistep(history: Sequence[Tensor]) -> Tensor:
    """The Adams-Bashforth slope of the stored drifts; its order is their number.

    Args:
        history: 1 to 4 drifts, newest first.

    Returns:
        The slope, shape of one drift.

    Source: iPNDM (arXiv 2204.13902).
    """
    slope, *older = [c * d for c, d in zip(ADAMS_BASHFORTH[len(history)], history, strict=True)]
    for term in older:
        slope = slope + term
    return slope


def stages(table: SolverTable, sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `epd_step` needs of a table, from sigmas [N+1]; each result is float64, [B or 1, N, K].

    Returns:
        The sigmas c * s at which the drift is evaluated, the offsets s - a along the slope, and the gains w * o * c of
        the drifts, where s is the sigma at the point's position and a the sigma at the interval's start.
    """
    grid = levels(table, sigmas).double().to(table.positions.device)[..., None]  # [N + 1, 1] or [B, N + 1, 1]
    a, b, r = grid[..., :-1, :], grid[..., 1:, :], table.positions.double()
    s = inner_sigma(a, b, r)
    c = torch.ones_like(s) if table.scale_time is None else table.scale_time.double()
    o = torch.ones_like(s) if table.scale_dir is None else table.scale_dir.double()
    shape = (-1, table.intervals, table.points)
    return (c * s).reshape(shape), (s - a).reshape(shape), (table.weights.double() * o * c).reshape(shape)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Values [k] or [B or 1, k] as [B or 1, k, 1, ...], with the dtype, device and rank of `like` [B, k, ...]."""
    cast = values.to(like.dtype).to(like.device)  # in this order: not every device has float64
    return cast.reshape(-1, values.shape[-1], *[1] * (like.ndim - 2))
