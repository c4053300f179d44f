"""Stable Diffusion 1.x, 2.x and XL, and every model in the same diffusers layout."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.backbones.cache import Embedding
from epd_ray.backbones.conditioning import per_row
from epd_ray.backbones.discrete import DiscreteTime, network_input
from epd_ray.backbones.loading import PipelineOptions, square_size
from epd_ray.backbones.pipeline import check_channels, decode_latents
from epd_ray.errors import ModelError, shown
from epd_ray.types import Form


class SDFamily:
    """A StableDiffusionPipeline as a family. A network that embeds the guidance scale, as those of latent consistency
    models do, takes no second pass for guidance.

    Args:
        pipeline: an open StableDiffusionPipeline.
        options: the options that it was opened with.

    Raises:
        ModelError: the training schedule is not supported, or the network needs inputs that the pipeline does not give.
    """

    name = "sd"
    form: Form = "ve"
    schedule = "uniform"
    published: str | None = "StableDiffusion"
    default_guidance = 7.5
    prompted = True
    classifier_free = True
    added_inputs: tuple[str | None, ...] = (None, "text")  # kinds of added embeddings that need no more than the text

    def __init__(self, pipeline: Any, options: PipelineOptions) -> None:
        self._pipeline, self._model = pipeline, options.model
        self._time = DiscreteTime(pipeline.scheduler, options.model)
        self._guidance_dim: int | None = None
        if pipeline.unet is not None:
            check_channels(pipeline.unet, pipeline.vae, 1, options.model)
            _check_inputs(pipeline.unet.config, self.added_inputs, options.model)
            self._guidance_dim = pipeline.unet.config.time_cond_proj_dim
            self.classifier_free = self._guidance_dim is None

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
        output = unet(
            network_input(x, sigma).to(unet.dtype), self._time.timestep(sigma),
            timestep_cond=self._embedded_guidance(x, guidance_scale), return_dict=False,
            **self._conditioning(x, tensors),
        )[0]  # fmt: skip
        return self._time.drift(x, sigma, output.float())

    def _embedded_guidance(self, x: Tensor, guidance_scale: float | Tensor) -> Tensor | None:
        if self._guidance_dim is None:
            return None
        scales = per_row(guidance_scale - 1, x).cpu()
        embedded: Tensor = self._pipeline.get_guidance_scale_embedding(scales, embedding_dim=self._guidance_dim)
        return embedded.to(x.device, self._pipeline.unet.dtype)

    def _conditioning(self, x: Tensor, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"encoder_hidden_states": tensors[0]}

    def images(self, x: Tensor, resolution: int) -> Tensor:
        return decode_latents(self._pipeline.vae, self._unscaled(x))

    def _unscaled(self, x: Tensor) -> Tensor:
        """The latents in the scale of the autoencoder; only the scale is read, as by the pipeline."""
        latents: Tensor = x / self._pipeline.vae.config.scaling_factor
        return latents


class SDXLFamily(SDFamily):
    """A StableDiffusionXLPipeline as a family: it has a second text encoder, the picture's size is an input of the
    network, and no prompt (but not the prompt "") is embedded as zeros if the model's configuration says so."""

    name = "sdxl"
    default_guidance = 5.0
    published = "StableDiffusionXL"
    added_inputs = (None, "text", "text_time")

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

    def _unscaled(self, x: Tensor) -> Tensor:
        config = self._pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super()._unscaled(x)
        return super()._unscaled(x * x.new_tensor(std).view(-1, 1, 1)) + x.new_tensor(mean).view(-1, 1, 1)


def _check_inputs(config: Any, added_inputs: tuple[str | None, ...], model: str) -> None:
    """Refuse a UNet that needs inputs that no text-to-image pipeline gives it."""
    accepted: dict[str, tuple[Any, ...]] = {
        "class_embed_type": (None,), "num_class_embeds": (None,), "addition_embed_type": added_inputs,
        "encoder_hid_dim_type": (None, "text_proj"),
    }  # fmt: skip
    for key, values in accepted.items():
        if config.get(key) not in values:
            known = ", ".join(map(str, values))
            raise ModelError(
                f"model {shown(model)}: its network has {key}={shown(config[key])}, which needs an input "
                f"that its pipeline does not give, expected one of {known}"
            )
