"""Stable Diffusion 1.x, 2.x and XL, and every model in the same diffusers layout."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.backbones.cache import Embedding
from epd_ray.backbones.discrete import DiscreteTime, network_input
from epd_ray.backbones.loading import PipelineOptions, square_size
from epd_ray.backbones.pipeline import decode_latents
from epd_ray.types import Form


class SDFamily:
    """A StableDiffusionPipeline as a family.

    Args:
        pipeline: an open StableDiffusionPipeline.
        options: the options that it was opened with.

    Raises:
        ModelError: the training schedule is not supported.
    """

    name = "sd"
    form: Form = "ve"
    schedule = "uniform"
    default_guidance = 7.5
    prompted = True
    classifier_free = True

    def __init__(self, pipeline: Any, options: PipelineOptions) -> None:
        self._pipeline, self._model = pipeline, options.model
        self._time = DiscreteTime(pipeline.scheduler, options.model)

    @property
    def pixel_step(self) -> int:
        return 8  # the multiple that the pipelines check, whatever their VAE

    @property
    def default_resolution(self) -> int:
        return square_size(self._pipeline.unet.config.sample_size, self._model) * int(self._pipeline.vae_scale_factor)

    @property
    def text_limits(self) -> Sequence[tuple[Any, int]]:
        return [(self._pipeline.tokenizer, self._pipeline.tokenizer.model_max_length)]

    @property
    def scheduler_facts(self) -> dict[str, JsonValue]:
        return self._time.facts

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        side = resolution // self._pipeline.vae_scale_factor
        return (self._pipeline.unet.config.in_channels, side, side)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        embeds, _ = self._pipeline.encode_prompt(prompt, device, 1, False)
        return (embeds[0],)

    def embed_nothing(self, device: torch.device) -> Embedding:
        return self.embed("", device)

    def sigmas(self, num_intervals: int, final_zero: bool, resolution: int) -> Tensor:
        return self._time.sigmas(num_intervals, final_zero)

    def initial(self, noise: Tensor) -> Tensor:
        return self._time.sigma_max * noise

    def network(self, x: Tensor, sigma: Tensor, tensors: tuple[Tensor, ...], guidance_scale: float) -> Tensor:
        """The drift from the UNet's output at x."""
        unet = self._pipeline.unet
        output = unet(
            network_input(x, sigma).to(unet.dtype), self._time.timestep(sigma),
            return_dict=False, **self._conditioning(x, tensors),
        )[0]  # fmt: skip
        return self._time.drift(x, sigma, output.float())

    def _conditioning(self, x: Tensor, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"encoder_hidden_states": tensors[0]}

    def images(self, x: Tensor, resolution: int) -> Tensor:
        return decode_latents(self._pipeline.vae, x)


class SDXLFamily(SDFamily):
    """A StableDiffusionXLPipeline as a family: it has a second text encoder, the picture's size is an input of the
    network, and the empty prompt is embedded as zeros if the model's configuration says so."""

    name = "sdxl"
    default_guidance = 5.0

    @property
    def text_limits(self) -> Sequence[tuple[Any, int]]:
        p = self._pipeline
        return [(t, t.model_max_length) for t in (p.tokenizer, p.tokenizer_2) if t is not None]

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        embeds, _, pooled, _ = self._pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
        return embeds[0], pooled[0]

    def embed_nothing(self, device: torch.device) -> Embedding:
        embeds, pooled = self.embed("", device)
        if self._pipeline.config.force_zeros_for_empty_prompt:
            return embeds.new_zeros(embeds.shape), pooled.new_zeros(pooled.shape)
        return embeds, pooled

    def _conditioning(self, x: Tensor, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        embeds, pooled = tensors
        size = [side * self._pipeline.vae_scale_factor for side in x.shape[2:]]
        ids = embeds.new_tensor([*size, 0, 0, *size]).expand(len(x), -1)  # original size, crop, target size
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
