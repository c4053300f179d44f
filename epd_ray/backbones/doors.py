"""How diffusers' pipelines for text to image call their networks, by class; nothing of diffusers is imported."""

from dataclasses import dataclass

from epd_ray.solvers.scheduler_config import TRAIN_TIMESTEPS
from epd_ray.types import Form


@dataclass(frozen=True)
class Door:
    """How a pipeline calls its network.

    Attributes:
        network: the pipeline's attribute.
        hidden: the network's argument for the latents.
        form: of the ODE.
        family: of the backbone, as solvers name it.
        time_unit: of the network's timestep, in the scheduler's.
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
