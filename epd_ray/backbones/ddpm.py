"""Unconditional models in pixel or latent space, such as the published ones for CIFAR-10, LSUN and CelebA-HQ."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.backbones.cache import Embedding
from epd_ray.backbones.discrete import DiscreteTime, network_input
from epd_ray.backbones.loading import PipelineOptions, square_size
from epd_ray.errors import ModelError, shown
from epd_ray.types import Form


class DDPMFamily:
    """A DDPMPipeline, DDIMPipeline or LDMPipeline as a family; the text of a prompt has no effect.

    Args:
        pipeline: an open pipeline of one of these classes.
        options: the options that it was opened with.

    Raises:
        ModelError: the schedule is not supported, the network is conditioned on classes, or its output has another
            number of channels than expected.
    """

    name = "ddpm"
    form: Form = "ve"
    schedule = "uniform"
    published = None
    default_guidance = 1.0
    prompted = False
    classifier_free = False
    text_limits: Sequence[tuple[Any, int]] = ()

    def __init__(self, pipeline: Any, options: PipelineOptions) -> None:
        self._pipeline, self._model = pipeline, options.model
        self._vqvae = getattr(pipeline, "vqvae", None)
        self._time = DiscreteTime(pipeline.scheduler, options.model)
        if pipeline.unet is not None:
            _check_network(pipeline.unet.config, pipeline.scheduler.config.get("variance_type"), options.model)

    @property
    def _scale(self) -> int:
        """Pixels per side of one latent value."""
        return 1 if self._vqvae is None else 2 ** (len(self._vqvae.config.block_out_channels) - 1)

    @property
    def pixel_step(self) -> int:
        return int(self._scale * 2 ** (len(self._pipeline.unet.config.block_out_channels) - 1))  # the UNet halves too

    @property
    def default_resolution(self) -> int:
        return square_size(self._pipeline.unet.config.sample_size, self._model) * self._scale

    @property
    def scheduler_facts(self) -> dict[str, JsonValue]:
        return self._time.facts

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        side = resolution // self._scale
        return (self._pipeline.unet.config.in_channels, side, side)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        return ()

    def embed_nothing(self, device: torch.device) -> Embedding:
        return ()

    def sigmas(
        self, num_intervals: int, final_zero: bool, resolution: int, changes: Mapping[str, Any] | None = None
    ) -> Tensor:
        return self._time.sigmas(num_intervals, final_zero)

    def shift(self, resolution: int) -> None:
        return None

    def initial(self, noise: Tensor) -> Tensor:
        return self._time.sigma_max * noise

    def network(self, x: Tensor, sigma: Tensor, tensors: tuple[Tensor, ...], guidance_scale: float | Tensor) -> Tensor:
        """The drift from the UNet's output at x."""
        unet = self._pipeline.unet
        output = unet(network_input(x, sigma).to(unet.dtype), self._time.timestep(sigma), return_dict=False)[0]
        return self._time.drift(
            x, sigma, output[:, : x.shape[1]].float()
        )  # channels of a learned variance come after these

    def images(self, x: Tensor, resolution: int) -> Tensor:
        if self._vqvae is None:
            return x
        config = self._vqvae.config
        # Diffusers fills in a factor that the model's own config lacks; such a model was trained on unscaled latents.
        factor = 1.0 if "scaling_factor" in config.get("_use_default_values", ()) else config.scaling_factor
        images: Tensor = self._vqvae.decode((x / factor).to(self._vqvae.dtype), return_dict=False)[0]
        return images


def _check_network(config: Any, variance_type: str | None, model: str) -> None:
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        raise ModelError(f"model {shown(model)} is conditioned on classes: give one that is unconditional")
    channels = config.in_channels
    learned = (variance_type or "").startswith("learned")
    if config.out_channels not in ((channels, 2 * channels) if learned else (channels,)):
        raise ModelError(
            f"model {shown(model)} gives {config.out_channels} channels for {channels}, with variance_type "
            f"{shown(variance_type)}: expected as many, or twice as many with a learned variance"
        )
