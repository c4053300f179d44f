"""What the flow-matching families share: the pipeline scheduler's own sigmas."""

from typing import Any

import numpy as np
from torch import Tensor

from epd_ray.errors import ModelError


def require_flow_scheduler(scheduler: Any, model: str) -> None:
    """Refuse schedulers whose sigmas are not one per step, or no flow's.

    Raises:
        ModelError: not a FlowMatchEulerDiscreteScheduler.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        name = type(scheduler).__name__
        raise ModelError(f"model {model!r} has a {name}, expected a FlowMatchEulerDiscreteScheduler")


def flow_sigmas(
    scheduler: Any, num_intervals: int, final_zero: bool, image_tokens: int, *, own_grid: bool = False
) -> Tensor:
    """The scheduler's sigmas with its shift; without `final_zero` one step more, whose end at 0 is dropped.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler; left as it is.
        num_intervals: N.
        final_zero: whether the last sigma is 0.
        image_tokens: of one image, which decide a dynamic shift.
        own_grid: with `final_zero`, hand over the grid 1, ..., 1 / N, as FluxPipeline does.

    Returns:
        Sigmas [N+1], float64, decreasing.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = type(scheduler).from_config(scheduler.config)
    config = scheduler.config
    mu = None
    if config.use_dynamic_shifting:
        mu = calculate_shift(
            image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
    if final_zero and own_grid:
        grid = np.linspace(1.0, 1 / num_intervals, num_intervals)
        scheduler.set_timesteps(sigmas=grid, mu=mu)
    else:
        scheduler.set_timesteps(num_intervals if final_zero else num_intervals + 1, mu=mu)
    sigmas: Tensor = scheduler.sigmas[: num_intervals + 1].double()
    return sigmas
