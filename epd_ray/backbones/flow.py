"""Shared by the flow-matching families: the sigmas of the pipeline's own scheduler.

Diffusers is imported inside the functions, because that takes seconds.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from epd_ray.errors import ModelError, shown
from epd_ray.solvers.scheduler_config import TRAIN_TIMESTEPS


def require_flow_scheduler(scheduler: Any, model: str) -> None:
    """Refuse any scheduler but a FlowMatchEulerDiscreteScheduler, because others have other sigmas or several per step.

    Raises:
        ModelError: the scheduler is of another class, or has timesteps or an order of sigmas that are not supported.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        name = type(scheduler).__name__
        raise ModelError(f"model {shown(model)} has a {name}, expected a FlowMatchEulerDiscreteScheduler")
    for key, value in (("num_train_timesteps", TRAIN_TIMESTEPS), ("invert_sigmas", False)):
        if scheduler.config[key] != value:
            raise ModelError(f"model {shown(model)}: its scheduler has {key}={scheduler.config[key]}, expected {value}")


def unscaled(x: Tensor, vae: Any) -> Tensor:
    """Latents in the scale of the autoencoder, from those in the scale of the denoising network."""
    latents: Tensor = x / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return latents


def flow_sigmas(
    scheduler: Any,
    num_intervals: int,
    final_zero: bool,
    image_tokens: int,
    *,
    own_grid: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Tensor:
    """The scheduler's shifted sigmas. Without `final_zero` they are those of N + 1 steps, without the 0 at their end.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler; it is not changed.
        num_intervals: N.
        final_zero: whether the last sigma is 0.
        image_tokens: number of tokens of one image, on which a dynamic shift depends.
        own_grid: whether, with `final_zero`, the scheduler gets the grid 1, ..., 1 / N, as from FluxPipeline.
        changes: arguments of `from_config` that differ from the scheduler's; "shift" takes the place of a dynamic one.

    Returns:
        Sigmas [N+1], float64, decreasing.
    """
    changes = dict(changes or {})
    if "shift" in changes:
        changes["use_dynamic_shifting"] = False
    scheduler = type(scheduler).from_config(scheduler.config, **changes)
    mu = _dynamic_shift(scheduler, image_tokens)
    if final_zero and own_grid:
        grid = np.linspace(1.0, 1 / num_intervals, num_intervals)
        scheduler.set_timesteps(sigmas=grid, mu=mu)
    else:
        scheduler.set_timesteps(num_intervals if final_zero else num_intervals + 1, mu=mu)
    sigmas: Tensor = scheduler.sigmas[: num_intervals + 1].double()
    return sigmas


def flow_shift(scheduler: Any, image_tokens: int) -> float:
    """The factor of the scheduler's shift; that of a dynamic one depends on the number of tokens of one image."""
    mu = _dynamic_shift(scheduler, image_tokens)
    return float(scheduler.config.shift) if mu is None else math.exp(mu)


def _dynamic_shift(scheduler: Any, image_tokens: int) -> float | None:
    """The logarithm of a dynamic shift, as in the pipelines; None where the shift is fixed."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    if not config.use_dynamic_shifting:
        return None
    mu: float = calculate_shift(
        image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    return mu
