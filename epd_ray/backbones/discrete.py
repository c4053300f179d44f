"""Shared by the families with discrete time: sigmas and timesteps of the training schedule, and the drift."""

from typing import Any, get_args

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.errors import ModelError, ScheduleError, shown
from epd_ray.solvers.network import unit_variance, ve_drift
from epd_ray.solvers.scheduler_config import SchedulerFacts, VEPrediction
from epd_ray.solvers.schedules import alphas_cumprod, discrete, timestep_grid, timestep_on_grid, timestep_to_sigma

PREDICTIONS: tuple[str, ...] = get_args(VEPrediction)
BETAS = tuple(name for name in SchedulerFacts.model_fields if name != "prediction_type")


class DiscreteTime:
    """A training schedule of T noise levels, in VE form: x = clean + sigma * noise.

    Args:
        scheduler: any diffusers scheduler with training betas; only its betas and prediction type are used.
        model: name of the model, for messages.

    Raises:
        ModelError: the schedule or the prediction type is not supported.
    """

    def __init__(self, scheduler: Any, model: str) -> None:
        config = scheduler.config
        if "beta_schedule" not in config:
            raise ModelError(f"model {shown(model)} has a {type(scheduler).__name__}, expected one with training betas")
        self.prediction_type = str(config.get("prediction_type", "epsilon"))
        if self.prediction_type not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise ModelError(f"model {shown(model)} predicts {shown(self.prediction_type)}, expected one of {known}")
        for key, value in (("timestep_type", "discrete"), ("use_flow_sigmas", False)):
            if config.get(key, value) != value:  # the network would be told another time, or see another noise
                raise ModelError(
                    f"model {shown(model)}: its scheduler has {key}={shown(config[key])}, expected {value!r}"
                )
        if config.get("rescale_betas_zero_snr"):
            raise ModelError(f"model {shown(model)} starts at infinite sigma (rescale_betas_zero_snr): not supported")
        self.alphas_cumprod = alphas_cumprod(scheduler.betas)
        self.facts: dict[str, JsonValue] = {"prediction_type": self.prediction_type}
        self.facts |= {key: _plain(config.get(key)) for key in BETAS if config.get(key) is not None}
        try:
            self._grids = {"cpu": timestep_grid(self.alphas_cumprod)}
        except ScheduleError as error:
            raise ModelError(f"model {shown(model)}: {error}") from error
        self.sigma_max = float(timestep_to_sigma(torch.tensor(len(self.alphas_cumprod) - 1.0), self.alphas_cumprod))

    def sigmas(self, num_intervals: int, final_zero: bool) -> Tensor:
        """Sigmas uniform in the model's time; with `final_zero` as EulerDiscreteScheduler with trailing spacing."""
        if not final_zero:
            return discrete(num_intervals + 1, self.alphas_cumprod)
        steps = len(self.alphas_cumprod)
        timesteps = (torch.arange(num_intervals, 0, -1, dtype=torch.float64) * steps / num_intervals).round() - 1
        return torch.cat([timestep_to_sigma(timesteps, self.alphas_cumprod), torch.zeros(1, dtype=torch.float64)])

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's timestep [B] at sigma [B], fractional between training steps; on sigma's device."""
        if sigma.device.type == "mps":  # which has no float64
            return timestep_on_grid(sigma.cpu(), self._grids["cpu"]).float().to(sigma.device)
        device = str(sigma.device)
        if device not in self._grids:
            self._grids[device] = self._grids["cpu"].to(sigma.device)
        return timestep_on_grid(sigma, self._grids[device]).float()

    def drift(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """dx/dsigma from the network's output at x [B, ...], sigma [B]."""
        return ve_drift(output, x, _spread(sigma, x), self.prediction_type)


def network_input(x: Tensor, sigma: Tensor) -> Tensor:
    """x [B, ...] at sigma [B], scaled to unit variance as in the network's training."""
    return unit_variance(x, _spread(sigma, x))


def _spread(sigma: Tensor, x: Tensor) -> Tensor:
    """Sigmas [B] as [B, 1, ...], so that they broadcast with x [B, ...]."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else [float(v) for v in value]
