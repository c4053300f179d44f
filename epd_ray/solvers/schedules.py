"""Sigma schedules: pure functions that return float64 sigmas [num_sigmas], decreasing; N intervals need N + 1."""

import math

import torch
from torch import Tensor

from epd_ray.errors import ScheduleError

_EPSILON_S = 1e-3  # smallest VP time, as in EDM (arXiv 2206.00364, table 1)


def polynomial(num_sigmas: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Uniform in sigma ** (1 / rho).

    Args:
        num_sigmas: number of sigmas, N + 1, >= 1.
        sigma_min: last sigma, > 0.
        sigma_max: first sigma, > sigma_min.
        rho: curvature, > 0; larger spends more intervals at small sigmas.

    Returns:
        Sigmas [num_sigmas], float64, decreasing.

    Raises:
        ScheduleError: a value outside its range.

    Source: EDM (arXiv 2206.00364), equation 5.
    """
    _check_range(num_sigmas, sigma_min, sigma_max, rho)
    return _power_ramp(num_sigmas, sigma_max, sigma_min, rho)


def logsnr(num_sigmas: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in log sigma.

    Args:
        num_sigmas: number of sigmas, N + 1, >= 1.
        sigma_min: last sigma, > 0.
        sigma_max: first sigma, > sigma_min.

    Returns:
        Sigmas [num_sigmas], float64, decreasing.

    Raises:
        ScheduleError: a value outside its range.

    Source: DPM-Solver (arXiv 2206.00927), uniform logSNR steps.
    """
    _check_range(num_sigmas, sigma_min, sigma_max)
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), num_sigmas, dtype=torch.float64).exp()


def time_uniform(num_sigmas: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Uniform in VP time ** (1 / rho), from time 1 to 1e-3.

    Args:
        num_sigmas: number of sigmas, N + 1, >= 1.
        sigma_min: last sigma, > 0.
        sigma_max: first sigma, > sigma_min.
        rho: curvature in time, > 0.

    Returns:
        Sigmas [num_sigmas], float64, decreasing.

    Raises:
        ScheduleError: a value outside its range.

    Source: EDM (arXiv 2206.00364), table 1, VP column.
    """
    _check_range(num_sigmas, sigma_min, sigma_max, rho)
    log_min, log_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_min / _EPSILON_S - log_max) / (_EPSILON_S - 1)
    beta_min = log_max - beta_d / 2
    t = _power_ramp(num_sigmas, 1.0, _EPSILON_S, rho)
    return (beta_d / 2 * t**2 + beta_min * t).expm1().sqrt()


def discrete(num_sigmas: int, alphas_cumprod: Tensor, rho: float = 1.0) -> Tensor:
    """Uniform in (a model's own discrete time) ** (1 / rho), from its last training step to its first.

    Args:
        num_sigmas: number of sigmas, N + 1, >= 1.
        alphas_cumprod: [T], in (0, 1), decreasing: the training noise schedule, see the function of that name.
        rho: curvature in time, > 0.

    Returns:
        Sigmas [num_sigmas], float64, decreasing.

    Raises:
        ScheduleError: a value outside its range.

    Source: DPM-Solver (arXiv 2206.00927), discrete-time models.
    """
    _check_ramp(num_sigmas, rho)
    steps = len(alphas_cumprod)
    return timestep_to_sigma(_power_ramp(num_sigmas, 1.0, 1 / steps, rho) * steps - 1, alphas_cumprod)


def flow_shifted(num_sigmas: int, shift: float = 3.0, t_min: float = 1e-3) -> Tensor:
    """Uniform in flow time, then shifted towards noise: sigma = shift * t / (1 + (shift - 1) * t).

    Args:
        num_sigmas: number of sigmas, N + 1, >= 1.
        shift: > 0; 1 is no shift.
        t_min: last time before the shift, in (0, 1).

    Returns:
        Sigmas [num_sigmas], float64, decreasing from 1.

    Raises:
        ScheduleError: a value outside its range.

    Source: SD3 (arXiv 2403.03206), equation 23.
    """
    _check_range(num_sigmas, t_min, 1.0, shift, curve_name="shift")
    t = torch.linspace(1.0, t_min, num_sigmas, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def alphas_cumprod(betas: Tensor) -> Tensor:
    """The training noise schedule [T] of betas [T], multiplied up in float64: float32 products cost a relative 1e-5."""
    return (1 - betas.double()).cumprod(0)


def timestep_to_sigma(timestep: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Sigma at a network timestep; between and beyond the training steps, log alpha is interpolated linearly.

    Args:
        timestep: [...], counted in training steps from 0; may be fractional.
        alphas_cumprod: [T], in (0, 1), decreasing.

    Returns:
        Sigmas [...], float64, VE form: sqrt(1 - alpha^2) / alpha.

    Source: DPM-Solver (arXiv 2206.00927), discrete-time models.
    """
    log_alpha = _log_alpha(alphas_cumprod)
    steps = torch.arange(len(log_alpha), dtype=torch.float64, device=log_alpha.device)
    return (-2 * _interpolate(timestep.double(), steps, log_alpha)).expm1().sqrt()


def sigma_to_timestep(sigma: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Network timestep at a sigma: the inverse of timestep_to_sigma.

    Args:
        sigma: [...], VE form, > 0.
        alphas_cumprod: [T], in (0, 1), decreasing.

    Returns:
        Timesteps [...], float64, in training steps from 0, fractional between them.

    Source: DPM-Solver (arXiv 2206.00927), discrete-time models.
    """
    return timestep_on_grid(sigma, timestep_grid(alphas_cumprod))


def timestep_grid(alphas_cumprod: Tensor) -> Tensor:
    """The lookup table of `timestep_on_grid`, so that the schedule is checked only once.

    Args:
        alphas_cumprod: [T], in (0, 1), decreasing.

    Returns:
        [2, T], float64: log alpha, increasing, and the training step of each.

    Raises:
        ScheduleError: alphas_cumprod is not one row of decreasing values in (0, 1).
    """
    log_alpha = _log_alpha(alphas_cumprod)
    steps = torch.arange(len(log_alpha), dtype=torch.float64, device=log_alpha.device)
    return torch.stack([log_alpha, steps]).flip(1)


def timestep_on_grid(sigma: Tensor, grid: Tensor) -> Tensor:
    """The same as `sigma_to_timestep`, but without reading any value on the CPU, so that a GPU is not waited for.

    Args:
        sigma: [...], VE form, > 0.
        grid: [2, T], from timestep_grid, on sigma's device.

    Returns:
        Timesteps [...], float64.
    """
    log_alpha, steps = grid
    return _interpolate(-0.5 * sigma.double().square().log1p(), log_alpha, steps)


def spanning(name: str, num_sigmas: int, sigma_min: float, sigma_max: float) -> Tensor:
    """A named schedule between two sigmas.

    Args:
        name: "polynomial", "logsnr" or "time_uniform".
        num_sigmas: number of sigmas, N + 1, >= 1.
        sigma_min: last sigma, > 0.
        sigma_max: first sigma, > sigma_min.

    Returns:
        Sigmas [num_sigmas], float64, decreasing.

    Raises:
        ScheduleError: a value outside its range.
    """
    make = {"polynomial": polynomial, "logsnr": logsnr, "time_uniform": time_uniform}[name]
    return make(num_sigmas, sigma_min, sigma_max)


def check_sigmas(sigmas: Tensor, *, allow_zero: bool = False) -> None:
    """Refuse sigmas that a solver cannot follow.

    Args:
        sigmas: [N+1].
        allow_zero: whether the last one may be 0.

    Raises:
        ScheduleError: not one row of at least 2 finite, strictly decreasing, positive values.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ScheduleError(f"sigmas have shape {list(sigmas.shape)}, expected [N+1] with N >= 1")
    values = sigmas.tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise ScheduleError(f"sigmas[{i}] is {value}, expected a finite number")
        if i and value >= values[i - 1]:
            raise ScheduleError(f"sigmas[{i}] is {value:g}, expected less than sigmas[{i - 1}] = {values[i - 1]:g}")
    if values[-1] < 0:
        raise ScheduleError(f"sigmas[{len(values) - 1}] is {values[-1]:g}, expected at least 0")
    if values[-1] == 0 and not allow_zero:
        raise ScheduleError(
            f"sigmas[{len(values) - 1}] is 0, where this solver's points are undefined (drop the terminal 0)"
        )


def _power_ramp(num: int, first: float, last: float, rho: float) -> Tensor:
    ramp = torch.linspace(0, 1, num, dtype=torch.float64)
    values: Tensor = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    return values


def _log_alpha(alphas_cumprod: Tensor) -> Tensor:
    acp = alphas_cumprod.double()
    if acp.ndim != 1 or len(acp) < 2 or not bool(((acp > 0) & (acp < 1)).all() and (acp.diff() < 0).all()):
        raise ScheduleError("alphas_cumprod must be one row of at least 2 decreasing values in (0, 1)")
    return 0.5 * acp.log()


def _interpolate(x: Tensor, xp: Tensor, fp: Tensor) -> Tensor:
    """Piecewise linear interpolation through (xp, fp), xp increasing; the outermost pieces are extrapolated."""
    right = torch.searchsorted(xp, x.contiguous()).clamp(1, len(xp) - 1)
    x0, x1, f0, f1 = xp[right - 1], xp[right], fp[right - 1], fp[right]
    return f0 + (x - x0) * (f1 - f0) / (x1 - x0)


def _check_ramp(num_sigmas: int, curve: float, curve_name: str = "rho") -> None:
    if num_sigmas < 1:
        raise ScheduleError(f"num_sigmas is {num_sigmas}, expected at least 1")
    if not (math.isfinite(curve) and curve > 0):
        raise ScheduleError(f"{curve_name} is {curve:g}, expected a finite number above 0")


def _check_range(
    num_sigmas: int, sigma_min: float, sigma_max: float, curve: float = 1.0, curve_name: str = "rho"
) -> None:
    _check_ramp(num_sigmas, curve, curve_name)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ScheduleError(
            f"sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}, expected 0 < sigma_min < sigma_max"
        )
