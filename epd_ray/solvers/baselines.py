"""Classic solvers to compare a learned table with. Each is called `solve(drift, x, sigmas, *, callback=None)`."""

from collections import deque
from itertools import pairwise

from torch import Tensor

from epd_ray.errors import ScheduleError
from epd_ray.solvers.epd import Callback, check_order, epd, multistep
from epd_ray.solvers.schedules import check_sigmas
from epd_ray.solvers.table import dpm2_table
from epd_ray.types import Drift


def euler(drift: Drift, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """Euler's method, which on this ODE is DDIM: N evaluations, parallel NFE N.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, >= 0.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or fall below 0.

    Source: DDIM (arXiv 2010.02502), equation 13.
    """
    return ipndm(drift, x, sigmas, order=1, callback=callback)


def heun(drift: Drift, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """Heun's method: 2N evaluations, parallel NFE 2N.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, > 0.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or reach 0.

    Source: EDM (arXiv 2206.00364), algorithm 1.
    """
    check_sigmas(sigmas)
    return _heun(drift, x, sigmas, callback)


def edm(drift: Drift, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """EDM's deterministic sampler: Heun's method, with an Euler step in the last interval, which ends at sigma 0.

    It takes 2N - 1 evaluations, all of which wait for each other.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing to 0.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N] = 0, [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease to 0.

    Source: EDM (arXiv 2206.00364), algorithm 1.
    """
    _check_ends_at_zero(sigmas, "heun")
    return _heun(drift, x, sigmas, callback)


def _check_ends_at_zero(sigmas: Tensor, other: str) -> None:
    check_sigmas(sigmas, allow_zero=True)
    if sigmas[-1] > 0:
        raise ScheduleError(f"sigmas[{len(sigmas) - 1}] is {sigmas[-1].item():g}, expected 0 ({other} ends above it)")


def _heun(drift: Drift, x: Tensor, sigmas: Tensor, callback: Callback | None) -> Tensor:
    for i, (a, b) in enumerate(pairwise(sigmas.tolist())):
        d = drift(x, x.new_full(x.shape[:1], a))
        if b > 0:
            d = (d + drift(x + (b - a) * d, x.new_full(x.shape[:1], b))) / 2
        x = x + (b - a) * d
        if callback is not None:
            callback(i, b, x)
    return x


def dpm2(drift: Drift, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """DPM-Solver-2: 2N evaluations, parallel NFE 2N.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, > 0.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or reach 0.

    Source: DPM-Solver (arXiv 2206.00927), algorithm 1.
    """
    check_sigmas(sigmas)
    return epd(drift, x, sigmas, dpm2_table(len(sigmas) - 1), callback=callback)


def kdpm2(drift: Drift, x: Tensor, sigmas: Tensor, *, callback: Callback | None = None) -> Tensor:
    """DPM-Solver-2 with an Euler step in the last interval, which ends at sigma 0: 2N - 1 evaluations, one by one.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing to 0.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N] = 0, [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease to 0.

    Source: k-diffusion's sample_dpm_2, which diffusers' KDPM2DiscreteScheduler follows.
    """
    _check_ends_at_zero(sigmas, "dpm2")
    if len(sigmas) > 2:
        x = dpm2(drift, x, sigmas[:-1], callback=callback)
    last = len(sigmas) - 2

    def end(_: int, sigma: float, state: Tensor) -> None:
        if callback is not None:
            callback(last, sigma, state)

    return euler(drift, x, sigmas[-2:], callback=end)


def ipndm(drift: Drift, x: Tensor, sigmas: Tensor, *, order: int = 4, callback: Callback | None = None) -> Tensor:
    """Improved pseudo-linear multistep (iPNDM): N evaluations, parallel NFE N.

    The first intervals use the lower orders, until enough drifts are stored.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, >= 0.
        order: number of drifts that a slope combines, 1 to 4.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or fall below 0.
        TableError: an order outside 1 to 4.

    Source: iPNDM (arXiv 2204.13902).
    """
    check_sigmas(sigmas, allow_zero=True)
    check_order(order)
    history: deque[Tensor] = deque(maxlen=order)
    for i, (a, b) in enumerate(pairwise(sigmas.tolist())):
        history.appendleft(drift(x, x.new_full(x.shape[:1], a)))
        x = x + (b - a) * multistep(history)
        if callback is not None:
            callback(i, b, x)
    return x
