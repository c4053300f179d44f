"""The guidance of each interval in pipelines whose guidance is a component of its own, a guider."""

import weakref
from typing import Any, cast

from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg
from torch import Tensor

from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import ModelError, TableError
from epd_ray.solvers.epd import spread
from epd_ray.solvers.stepwise import GuidedCall


class IntervalGuider(ClassifierFreeGuidance):  # type: ignore[misc]  # diffusers ships no types
    """Guides each evaluation as the table of an EPDScheduler says; as the guider before it under another scheduler.

    Args:
        own: the pipeline's guider, whose scale holds where the table sets none.
        pipe: the pipeline.
        scheduler: tells what the next call needs.

    Raises:
        ModelError: the guider is of another kind, or guides some of the steps alone.
    """

    def __init__(self, own: Any, pipe: "weakref.ref[Any]", scheduler: EPDScheduler) -> None:
        kind = type(own).__name__
        if kind != "ClassifierFreeGuidance" or own.use_original_formulation:
            raise ModelError(
                f"the pipeline's guider is a {kind}, expected a ClassifierFreeGuidance in its usual formulation, whose "
                "scale can be set for each interval (give the pipeline one, or use a solver without guidance and reuse)"
            )
        if (own._start, own._stop) != (0.0, 1.0):
            raise ModelError(
                f"the pipeline's guider acts between {own._start:g} and {own._stop:g} of its steps, expected 0 and 1, "
                "because the solver sets the guidance of each interval (leave start and stop out)"
            )
        super().__init__(guidance_scale=own.guidance_scale, guidance_rescale=own.guidance_rescale, enabled=own._enabled)
        self._pipe, self._scheduler = pipe, scheduler
        self._call: GuidedCall | None = None  # between the preparation of its inputs and its answer

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Diffusers' pipelines call this before they ask the network."""
        super().set_state(step, num_inference_steps, timestep)
        pipe = self._pipe()
        self._call = self._scheduler.guided_call() if pipe is not None and pipe.scheduler is self._scheduler else None
        scale = 0.0 if self._call is None else self._call.scale or 0.0
        if scale > 1 and not super()._is_cfg_enabled():
            raise TableError(
                f"the solver sets guidance scale {scale:g}, but the pipeline's guider does not guide "
                "(give it a guidance_scale above 1)"
            )

    def _is_cfg_enabled(self) -> bool:
        """Whether the network is asked without the prompt too; its name is that of diffusers."""
        enabled = cast(bool, super()._is_cfg_enabled())
        if self._call is None or not enabled:
            return enabled
        return self._call.effect is None and (self._call.scale is None or self._call.scale > 1)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided answer, from the answers to the prompt and to no prompt [B, ...]."""
        call = self._call
        if call is None:
            return super().forward(pred_cond, pred_uncond)
        scale = self.guidance_scale if call.scale is None else call.scale
        answer = pred_cond
        if pred_uncond is not None:
            difference = pred_cond - pred_uncond
            gains = spread(call.gains, difference.unsqueeze(1))[:, 0]
            call.keep(gains * difference)
            answer = pred_uncond + scale * difference
        elif call.effect is not None:
            gains = spread(call.gains, call.effect.unsqueeze(1))[:, 0]
            answer = pred_cond + ((scale - 1) * call.effect / gains).to(pred_cond)
        if self.guidance_rescale > 0:
            answer = rescale_noise_cfg(answer, pred_cond, self.guidance_rescale)
        self._call = None
        return GuiderOutput(pred=answer, pred_cond=pred_cond, pred_uncond=pred_uncond)
