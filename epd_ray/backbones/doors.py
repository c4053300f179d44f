"""How diffusers' text-to-image pipelines call their networks, by pipeline class. Diffusers is not imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epd_ray.solvers.scheduler_config import TRAIN_TIMESTEPS
from epd_ray.types import Form


@dataclass(frozen=True)
class Door:
    """How a pipeline calls its network.

    Attributes:
        network: the attribute of the pipeline that holds the network.
        hidden: name of the network's argument for the latents.
        form: how noise enters x, "ve" or "flow".
        family: the backbone's family, as solver files name it.
        time_unit: factor from the scheduler's timestep to the network's.
    """

    network: str
    hidden: str
    form: Form
    family: str
    time_unit: float = 1.0


DOORS = {
    "StableDiffusionPipeline": Door("unet", "sample", "ve", "sd"),
    "StableDiffusionXLPipeline": Door("unet", "sample", "ve", "sdxl"),
    "StableDiffusion3Pipeline": Door("transformer", "hidden_states", "flow", "sd3"),
    "FluxPipeline": Door("transformer", "hidden_states", "flow", "flux", 1 / TRAIN_TIMESTEPS),
}

GUIDED = {
    **DOORS,
    **{
        name: DOORS[first]
        for first, names in {
            "StableDiffusionPipeline": (
                "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionControlNetPipeline",
            ),
            "StableDiffusionXLPipeline": (
                "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
                "StableDiffusionXLControlNetPipeline",
            ),
            "StableDiffusion3Pipeline": (
                "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline",
                "StableDiffusion3ControlNetPipeline",
            ),
            "FluxPipeline": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        }.items()
        for name in names
    },
}  # fmt: skip
"""The same for these and for the pipelines that call and guide the network as they do, but begin from pictures."""


def door_of(pipe: Any) -> Door | None:
    """How a pipeline, or a subclass of a known one, calls its network; None for any other object."""
    return _among(DOORS, pipe)


def guided_door_of(pipe: Any) -> Door | None:
    """How a pipeline of a class in GUIDED calls its network; None for any other object."""
    return _among(GUIDED, pipe)


def _among(doors: Mapping[str, Door], pipe: Any) -> Door | None:
    return next((doors[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in doors), None)
