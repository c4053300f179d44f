"""How diffusers' text-to-image pipelines call their networks, by pipeline class. Diffusers is not imported."""

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


def door_of(pipe: Any) -> Door | None:
    """How a pipeline, or a subclass of a known one, calls its network; None for any other object."""
    return next((DOORS[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in DOORS), None)
