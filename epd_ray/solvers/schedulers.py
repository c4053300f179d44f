"""Multistep methods of diffusers' own schedulers, on any sigmas: `solve(drift, x, sigmas, *, form, ...)`.

Diffusers is imported inside the functions, because that takes seconds.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from epd_ray.errors import TableError
from epd_ray.solvers.epd import Callback
from epd_ray.solvers.schedules import check_sigmas
from epd_ray.types import Drift, Form

Options = Mapping[str, Any] | None
BELOW_ONE = 1 - 1e-6  # what a flow's first sigma counts as: at 1 the logSNR is infinite (as in diffusers' UniPC)


def dpmpp(
    drift: Drift,
    x: Tensor,
    sigmas: Tensor,
    *,
    form: Form,
    order: int = 2,
    options: Options = None,
    callback: Callback | None = None,
) -> Tensor:
    """Multistep DPM-Solver++ (DPMSolverMultistepScheduler): N evaluations, parallel NFE N.

    As in diffusers, an interval that ends at 0 is of first order, and with fewer than 15 intervals the last ones are of
    lower order. Diffusers' step rounds to float32.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, >= 0; at most 1 in flow form.
        form: how noise enters x, "ve" or "flow".
        order: 1 to 3.
        options: arguments of the scheduler that differ from its defaults, see epd_ray.solvers.rival.STEP_OPTIONS.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or fall below 0.
        TableError: an order out of range.

    Source: DPM-Solver++ (arXiv 2211.01095), algorithm 2.
    """
    from diffusers import DPMSolverMultistepScheduler

    check_sigmas(sigmas, allow_zero=True)
    chosen = _settings(order, form, options)
    scheduler = DPMSolverMultistepScheduler(**chosen, final_sigmas_type="zero" if sigmas[-1] == 0 else "sigma_min")
    return _follow(scheduler, drift, x, sigmas, form, callback)


def unipc(
    drift: Drift,
    x: Tensor,
    sigmas: Tensor,
    *,
    form: Form,
    order: int = 2,
    options: Options = None,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC, predictor and corrector (UniPCMultistepScheduler, B2): N evaluations, parallel NFE N.

    As in diffusers, the last intervals are of lower order.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, >= 0; at most 1 in flow form.
        form: how noise enters x, "ve" or "flow".
        order: order of the predictor, 1 to 3.
        options: arguments of the scheduler that differ from its defaults, see epd_ray.solvers.rival.STEP_OPTIONS.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or fall below 0.
        TableError: an order out of range.

    Source: UniPC (arXiv 2302.04867).
    """
    from diffusers import UniPCMultistepScheduler

    check_sigmas(sigmas, allow_zero=True)
    chosen = _settings(order, form, options)
    scheduler = UniPCMultistepScheduler(**chosen)
    return _follow(scheduler, drift, x, sigmas, form, callback)


def deis(
    drift: Drift,
    x: Tensor,
    sigmas: Tensor,
    *,
    form: Form,
    order: int = 2,
    options: Options = None,
    callback: Callback | None = None,
) -> Tensor:
    """DEIS, log-rho multistep (DEISMultistepScheduler): N evaluations, parallel NFE N.

    As in diffusers, with fewer than 15 intervals the last ones are of lower order.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, > 0; at most 1 in flow form.
        form: how noise enters x, "ve" or "flow".
        order: 1 to 3.
        options: arguments of the scheduler that differ from its defaults, see epd_ray.solvers.rival.STEP_OPTIONS.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or reach 0.
        TableError: an order out of range.

    Source: DEIS (arXiv 2204.13902).
    """
    from diffusers import DEISMultistepScheduler

    check_sigmas(sigmas)
    chosen = _settings(order, form, options)
    scheduler = DEISMultistepScheduler(**chosen)
    return _follow(scheduler, drift, x, sigmas, form, callback)


def _settings(order: int, form: Form, options: Options) -> dict[str, Any]:
    """The arguments of a scheduler. The drift is the predicted noise in VE form, and the velocity in flow form."""
    if order not in (1, 2, 3):
        raise TableError(f"order is {order}, expected 1, 2 or 3")
    drift = "flow_prediction" if form == "flow" else "epsilon"
    return {"solver_order": order, "prediction_type": drift, "use_flow_sigmas": form == "flow", **(options or {})}


def _on_grid(scheduler: Any, sigmas: Tensor, device: torch.device) -> None:
    """Set a scheduler to the start of any sigmas [N+1].

    Only UniPC in flow form accepts sigmas in its public `set_timesteps`. So this first calls that, which clears the
    scheduler's memory, and then sets the attributes that `step` reads. The timesteps are mere labels: `drift` takes
    sigma itself.
    """
    steps = len(sigmas) - 1
    scheduler.set_timesteps(steps)
    grid = sigmas.clone() if device.type == "mps" else sigmas.double()  # no float64 there
    if scheduler.config.use_flow_sigmas:
        grid = grid.clamp(max=BELOW_ONE)
    scheduler.sigmas = grid.float() if device.type == "mps" else grid
    scheduler.timesteps = torch.arange(steps)
    scheduler.set_begin_index(0)


def _follow(scheduler: Any, drift: Drift, x: Tensor, sigmas: Tensor, form: Form, callback: Callback | None) -> Tensor:
    """The denoising loop of diffusers' pipelines.

    The state is float64 where the device has that type, because DEIS divides by 1 - sigma in flow form.
    """
    _on_grid(scheduler, sigmas, x.device)
    values = sigmas.tolist()
    # diffusers keeps x in VP form, x / sqrt(1 + sigma^2), where ours is VE.
    scales = [1.0 if form == "flow" else (1 + value**2) ** 0.5 for value in values]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    state = x.to(wide).reshape(len(x), -1) / scales[0]  # [B, D]: UniPC wants two dimensions or more
    for i, (a, b) in enumerate(pairwise(values)):
        d = drift(x, x.new_full(x.shape[:1], a)).to(wide).reshape(state.shape)
        state = scheduler.step(d, scheduler.timesteps[i], state, return_dict=False)[0]
        x = (scales[i + 1] * state).reshape(x.shape).to(x.dtype)
        if callback is not None:
            callback(i, b, x)
    return x
