"""The guidance of each interval inside an unmodified pipeline: hooks around its network.

A pipeline keeps one guidance scale S and mixes empty + S * (text - empty), of the answers of its network to no prompt
and to the prompt, which it asks for as two halves of one batch. At a scale s the hook gives it another first half,
text - (s - 1) / (S - 1) * (text - empty), so that the pipeline's own mixing comes to the scale s. The second half stays
as it is, for whatever else the pipeline does with it. An evaluation without the pass for no prompt asks the network for
the second half alone. A network that takes the scale as an input is told another one.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from epd_ray.backbones.doors import GUIDED, Door, guided_door_of
from epd_ray.deploy.inputs import SHARED, by_name, each_tensor, with_answer
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import ModelError, TableError
from epd_ray.solvers import SolverTable
from epd_ray.solvers.epd import spread
from epd_ray.solvers.stepwise import GuidedCall


def guidable_door(pipe: Any, table: SolverTable) -> Door:
    """How a pipeline calls its network, for a table that sets the guidance of each interval.

    Raises:
        ModelError: guidance cannot be set in this pipeline.
    """
    door = guided_door_of(pipe)
    if door is None:
        raise ModelError(
            f"{type(pipe).__name__} has no hook for the guidance of each interval, expected one of "
            f"{', '.join(GUIDED)} (sample with epd-ray, or use a solver without the parts guidance and reuse)"
        )
    if table.guidance is not None and not getattr(pipe, door.network).config.get("guidance_embeds", True):
        raise ModelError(
            "the network of this pipeline takes no guidance scale (guidance_embeds is false): "
            "use a solver without the part guidance"
        )
    return door


class GuidanceHook:
    """The two hooks around the network of a pipeline whose EPDScheduler has a table that sets guidance.

    Args:
        pipe: the pipeline; the hooks do nothing while another scheduler is in it.
        scheduler: tells what the next call needs.
        door: how the pipeline calls its network.
    """

    def __init__(self, pipe: "weakref.ref[Any]", scheduler: EPDScheduler, door: Door) -> None:
        self._pipe, self._scheduler, self._door = pipe, scheduler, door
        self._call: GuidedCall | None = None  # under way in the network
        self._own = 1.0  # the pipeline's guidance scale
        self._alone = False  # whether the network is asked with the prompt alone

    def before(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the rows without the prompt away where they are not needed, or tell the network the scale."""
        self._call = None
        pipe = self._pipe()
        if pipe is None or pipe.scheduler is not self._scheduler or kwargs.get("skip_layers") is not None:
            return None
        call = self._scheduler.guided_call()
        if call is None:
            return None
        given = by_name(self._door, args, kwargs)
        scale, rows = call.scale, len(given[self._door.hidden])
        if given.get("guidance") is not None or given.get("timestep_cond") is not None:
            return None if scale is None else ((), given | _embedded(pipe, network, given, scale))
        if not getattr(pipe, "do_classifier_free_guidance", False):
            if scale is not None and scale > 1:
                raise TableError(
                    f"the solver sets guidance scale {scale:g}, but the pipeline's guidance_scale is "
                    f"{pipe.guidance_scale:g}, without guidance (pass a guidance_scale above 1)"
                )
            return None
        self._call, self._own = call, float(pipe.guidance_scale)
        self._alone = call.effect is not None or (scale is not None and scale <= 1)
        if not self._alone:
            return None
        half = rows // 2

        def prompted(values: Tensor) -> Tensor:
            return values[half:] if values.ndim and len(values) == rows else values

        return (), {n: v if n in SHARED else each_tensor(v, prompted) for n, v in given.items()}

    def after(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Move the answer to no prompt, or make up for it where the network was not asked for it."""
        call, self._call = self._call, None
        if call is None:
            return None
        answer: Tensor = output[0]
        scale = self._own if call.scale is None else call.scale
        if self._alone:
            text, difference = answer.float(), None if call.effect is None else call.effect
        else:
            empty, text = answer.float().chunk(2)
            by_point = (text - empty).unflatten(0, (-1, len(call.gains)))  # [B, k, ...]
            call.keep((spread(call.gains, by_point) * by_point)[:, -1])
            if call.scale is None:
                return None
            difference = None
        if difference is not None:  # of the drift [B, ...]: divided by the gains, of the network's output
            repeated = difference.unsqueeze(1).expand(-1, len(call.gains), *difference.shape[1:])
            moved = (repeated / spread(call.gains, repeated)).flatten(0, 1)
        else:
            moved = torch.zeros_like(text) if self._alone else text - empty
        first = text - (scale - 1) / (self._own - 1) * moved
        return with_answer(output, torch.cat([first, text]).to(answer.dtype))


def _embedded(pipe: Any, network: nn.Module, given: Mapping[str, Any], scale: float) -> dict[str, Tensor]:
    """The argument by which a network is told the guidance scale."""
    told: Tensor | None = given.get("guidance")
    if told is not None:
        return {"guidance": torch.full_like(told, scale)}
    told = given["timestep_cond"]
    scales = torch.full((len(told),), scale - 1)
    embedded: Tensor = pipe.get_guidance_scale_embedding(scales, embedding_dim=told.shape[-1])
    return {"timestep_cond": embedded.to(told)}
