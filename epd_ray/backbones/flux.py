"""FLUX.1: its latents are packed, its guidance is an input of the network, its shift depends on the resolution."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.backbones.cache import Embedding
from epd_ray.backbones.conditioning import per_row
from epd_ray.backbones.flow import flow_shift, flow_sigmas, require_flow_scheduler, unscaled
from epd_ray.backbones.loading import PipelineOptions
from epd_ray.backbones.pipeline import check_channels, decode_latents
from epd_ray.solvers.scheduler_config import FLOW_FACTS
from epd_ray.types import Form

T5_TOKENS = 512  # the default of the pipeline's call


class FluxFamily:
    """A FluxPipeline as a family; the solver's state is the packed latents [B, tokens, 4 * channels].

    Args:
        pipeline: an open FluxPipeline.
        options: the options that it was opened with.

    Raises:
        ModelError: the scheduler is not supported, or the network is not one for text to image.
    """

    name = "flux"
    form: Form = "flow"
    schedule = "shift"
    published = None
    default_guidance = 3.5
    prompted = True
    classifier_free = False  # the guidance scale is an input of the network

    def __init__(self, pipeline: Any, options: PipelineOptions) -> None:
        self._pipeline = pipeline
        require_flow_scheduler(pipeline.scheduler, options.model)
        check_channels(pipeline.transformer, pipeline.vae, 4, options.model)  # 2 x 2 latents make a token
        self._t5_tokens = options.max_sequence_length or T5_TOKENS
        self._image_ids: dict[int, Tensor] = {}

    @property
    def pixel_step(self) -> int:
        return int(self._pipeline.vae_scale_factor * 2)  # 2 x 2 latents make a token

    @property
    def default_resolution(self) -> int:
        return int(self._pipeline.default_sample_size * self._pipeline.vae_scale_factor)

    @property
    def text_limits(self) -> Sequence[tuple[Any, int]]:
        return [(self._pipeline.tokenizer_2, self._t5_tokens)]  # CLIP gives one pooled vector beside T5's tokens

    @property
    def scheduler_facts(self) -> dict[str, JsonValue]:
        return dict(FLOW_FACTS)

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        side = resolution // self._pipeline.vae_scale_factor
        return (self._pipeline.transformer.config.in_channels // 4, side, side)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        embeds, pooled, _ = self._pipeline.encode_prompt(
            prompt, None, device=device, max_sequence_length=self._t5_tokens
        )
        return embeds[0], pooled[0]

    def embed_nothing(self, device: torch.device) -> Embedding:
        return self.embed("", device)

    def sigmas(
        self, num_intervals: int, final_zero: bool, resolution: int, changes: Mapping[str, Any] | None = None
    ) -> Tensor:
        tokens = (resolution // self.pixel_step) ** 2
        return flow_sigmas(self._pipeline.scheduler, num_intervals, final_zero, tokens, own_grid=True, changes=changes)

    def shift(self, resolution: int) -> float:
        return flow_shift(self._pipeline.scheduler, (resolution // self.pixel_step) ** 2)

    def initial(self, noise: Tensor) -> Tensor:
        packed: Tensor = self._pipeline._pack_latents(noise, *noise.shape)  # [B, C, H, W] -> [B, H/2 * W/2, 4C]
        return packed

    def network(self, x: Tensor, sigma: Tensor, tensors: tuple[Tensor, ...], guidance_scale: float | Tensor) -> Tensor:
        """The network's velocity, which is the drift in flow form; the network's timestep is sigma itself."""
        transformer = self._pipeline.transformer
        embeds, pooled = tensors
        guidance = per_row(guidance_scale, x) if transformer.config.guidance_embeds else None
        velocity: Tensor = transformer(
            hidden_states=x.to(transformer.dtype), timestep=sigma.float(), guidance=guidance, pooled_projections=pooled,
            encoder_hidden_states=embeds, txt_ids=embeds.new_zeros(embeds.shape[1], 3), img_ids=self._ids(x),
            return_dict=False,
        )[0]  # fmt: skip
        return velocity.float()

    def _ids(self, x: Tensor) -> Tensor:
        """The position of each token for the network, [tokens, 3]: 0, row and column."""
        tokens = x.shape[1]
        if tokens not in self._image_ids:
            side = int(tokens**0.5)
            dtype = self._pipeline.transformer.dtype
            self._image_ids[tokens] = self._pipeline._prepare_latent_image_ids(1, side, side, x.device, dtype)
        return self._image_ids[tokens]

    def images(self, x: Tensor, resolution: int) -> Tensor:
        latents = self._pipeline._unpack_latents(x, resolution, resolution, self._pipeline.vae_scale_factor)
        return decode_latents(self._pipeline.vae, unscaled(latents, self._pipeline.vae))
