"""Stable Diffusion 3 and 3.5, and every model in their diffusers layout."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.backbones.cache import Embedding
from epd_ray.backbones.flow import flow_shift, flow_sigmas, require_flow_scheduler, unscaled
from epd_ray.backbones.loading import PipelineOptions, square_size
from epd_ray.backbones.pipeline import check_channels, decode_latents
from epd_ray.errors import ModelError, shown
from epd_ray.solvers.scheduler_config import FLOW_FACTS, TRAIN_TIMESTEPS
from epd_ray.types import Form

T5_TOKENS = 256  # the default of the pipeline's call


class SD3Family:
    """A StableDiffusion3Pipeline as a family.

    Args:
        pipeline: an open StableDiffusion3Pipeline.
        options: the options that it was opened with. Without T5, the pipeline pads with max_sequence_length empty
            tokens.

    Raises:
        ModelError: the scheduler is not supported, the network is not one for text to image, or the resolution needs
            more positions than it has.
    """

    name = "sd3"
    form: Form = "flow"
    schedule = "shift"
    published = None
    default_guidance = 4.5
    prompted = True
    classifier_free = True

    def __init__(self, pipeline: Any, options: PipelineOptions) -> None:
        self._pipeline, self._model = pipeline, options.model
        require_flow_scheduler(pipeline.scheduler, options.model)
        check_channels(pipeline.transformer, pipeline.vae, 1, options.model)
        self._t5_tokens = options.max_sequence_length or T5_TOKENS
        if pipeline.transformer is not None:
            _check_positions(options.resolution or 0, self.pixel_step, pipeline.transformer.config, options.model)

    @property
    def pixel_step(self) -> int:
        return int(self._pipeline.vae_scale_factor * self._pipeline.patch_size)

    @property
    def default_resolution(self) -> int:
        return square_size(self._pipeline.default_sample_size, self._model) * int(self._pipeline.vae_scale_factor)

    @property
    def text_limits(self) -> Sequence[tuple[Any, int]]:
        p = self._pipeline
        limits = [(p.tokenizer, p.tokenizer_max_length), (p.tokenizer_2, p.tokenizer_max_length)]
        return limits if p.tokenizer_3 is None else [*limits, (p.tokenizer_3, self._t5_tokens)]

    @property
    def scheduler_facts(self) -> dict[str, JsonValue]:
        return dict(FLOW_FACTS)

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        side = resolution // self._pipeline.vae_scale_factor
        return (self._pipeline.transformer.config.in_channels, side, side)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens,
        )  # fmt: skip
        return embeds[0], pooled[0]

    def embed_nothing(self, device: torch.device) -> Embedding:
        return self.embed("", device)

    def sigmas(
        self, num_intervals: int, final_zero: bool, resolution: int, changes: Mapping[str, Any] | None = None
    ) -> Tensor:
        tokens = (resolution // self.pixel_step) ** 2
        return flow_sigmas(self._pipeline.scheduler, num_intervals, final_zero, tokens, changes=changes)

    def shift(self, resolution: int) -> float:
        return flow_shift(self._pipeline.scheduler, (resolution // self.pixel_step) ** 2)

    def initial(self, noise: Tensor) -> Tensor:
        return noise  # flow matching starts at sigma = 1

    def network(self, x: Tensor, sigma: Tensor, tensors: tuple[Tensor, ...], guidance_scale: float | Tensor) -> Tensor:
        """The network's velocity, which is the drift in flow form."""
        transformer = self._pipeline.transformer
        embeds, pooled = tensors
        velocity: Tensor = transformer(
            hidden_states=x.to(transformer.dtype), timestep=(TRAIN_TIMESTEPS * sigma).float(),
            encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False,
        )[0]  # fmt: skip
        return velocity.float()

    def images(self, x: Tensor, resolution: int) -> Tensor:
        return decode_latents(self._pipeline.vae, unscaled(x, self._pipeline.vae))


def _check_positions(resolution: int, step: int, config: Any, model: str) -> None:
    most = config.pos_embed_max_size
    if most is not None and resolution > most * step:
        raise ModelError(
            f"model {shown(model)}: resolution {resolution} is beyond its positions: use at most {most * step}"
        )
