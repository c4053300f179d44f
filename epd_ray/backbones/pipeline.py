"""A diffusers pipeline as an ODE in sigma. Differences between families are behind the protocol `Family`."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.backbones.cache import Embedding, EmbeddingCache, Prompt
from epd_ray.backbones.conditioning import TextConditioning, guided_at, guided_drift
from epd_ray.backbones.grids import published_grid, scheduler_grid
from epd_ray.backbones.loading import PipelineOptions
from epd_ray.errors import ModelError, shown
from epd_ray.randomness import torch_generator
from epd_ray.solvers.costs import passes_per_eval
from epd_ray.types import Conditioning, Form, Grid
from epd_ray.weights.devices import pick_dtype


class Family(Protocol):
    """What differs between families of pipelines.

    Attributes:
        name: name of the family, as in solver files.
        form: how noise enters x, "ve" or "flow".
        schedule: the name of the family's own schedule in epd_ray.solvers.schedule_names.SCHEDULES.
        default_guidance: the guidance scale that the family is usually run with.
        prompted: whether the pictures depend on a prompt.
        classifier_free: whether guidance takes a second pass of the network for the empty prompt.
        published: what the model is called in diffusers' tables of published noise levels; None if it is in none.
        pixel_step: the resolution must be a multiple of this number of pixels.
        default_resolution: pixels per side, if the user asks for none.
        text_limits: for each text encoder, its tokenizer and the largest number of tokens that it reads.
        scheduler_facts: fields of epd_ray.solvers.scheduler_config.SchedulerFacts, as JSON values.
    """

    name: str
    form: Form
    schedule: str
    default_guidance: float
    prompted: bool
    classifier_free: bool
    published: str | None

    @property
    def pixel_step(self) -> int: ...

    @property
    def default_resolution(self) -> int: ...

    @property
    def text_limits(self) -> Sequence[tuple[Any, int]]: ...

    @property
    def scheduler_facts(self) -> dict[str, JsonValue]: ...

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """The shape of one image's noise."""
        ...

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """The tensors of one prompt, without a batch dimension, on a device (looking that up each time takes long)."""
        ...

    def embed_nothing(self, device: torch.device) -> Embedding:
        """The tensors for no prompt, as the pipeline makes them for classifier-free guidance."""
        ...

    def sigmas(
        self, num_intervals: int, final_zero: bool, resolution: int, changes: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The sigmas [num_intervals + 1] of the family's own schedule, see `Backbone.sigmas`.

        A flow takes `changes`, the arguments of `from_config` that differ from those of the pipeline's scheduler.
        """
        ...

    def shift(self, resolution: int) -> float | None:
        """The factor by which the pipeline shifts a flow's noise levels; None in VE form."""
        ...

    def initial(self, noise: Tensor) -> Tensor:
        """See Backbone.initial."""
        ...

    def network(self, x: Tensor, sigma: Tensor, tensors: tuple[Tensor, ...], guidance_scale: float | Tensor) -> Tensor:
        """dx/dsigma before classifier-free guidance; float32, differentiable in x and sigma."""
        ...

    def images(self, x: Tensor, resolution: int) -> Tensor:
        """Decoded images [B, 3, H, W], in [-1, 1] up to the VAE's overshoot."""
        ...


class PipelineBackbone:
    """A pipeline as an epd_ray.types.Backbone. The networks run in their dtype; state, guidance and noise are float32.

    Args:
        pipeline: the result of `open_pipeline`.
        family: the family object of the same pipeline.
        options: the options that the pipeline was opened with.
        commit: commit of a hub repository; None for a directory.
        fingerprint: fingerprint of a directory, see `Index`; None for a hub repository.

    Raises:
        ModelError: the model cannot draw at this resolution.
    """

    def __init__(
        self,
        pipeline: Any,
        family: Family,
        options: PipelineOptions,
        commit: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.pipeline, self._family, self.options = pipeline, family, options
        self.model_id, self.family, self.form = options.model, family.name, family.form
        self.schedule, self.default_guidance = family.schedule, family.default_guidance
        self.classifier_free = family.classifier_free
        self.device = pipeline._execution_device
        self._dtype = pick_dtype(options.dtype, self.device)
        # With the text encoders alone nothing is drawn, and there is no network that has a size.
        self.resolution = options.resolution or (0 if options.parts == "text" else family.default_resolution)
        if options.parts != "text":
            _check_resolution(self.model_id, self.resolution, family.pixel_step)
        self.facts: Mapping[str, JsonValue] = {
            "resolution": self.resolution,
            "revision": commit or options.revision,
            **({} if fingerprint is None else {"fingerprint": fingerprint}),
            "dtype": str(self._dtype).removeprefix("torch."),
            "scheduler": family.scheduler_facts,
            **({} if family.prompted else {"prompted": False}),
        }
        self.embeddings = EmbeddingCache(self._embed, options.embedding_cache_mib << 20)

    def encode_with(self, embed: Callable[[Prompt], Embedding]) -> None:
        """Embed prompts by another function, for example one that asks an actor with the text encoders."""
        self.embeddings = EmbeddingCache(embed, self.options.embedding_cache_mib << 20)

    @torch.no_grad()  # not inference_mode, because embeddings are part of a graph when a table is fitted by gradient
    def _embed(self, prompt: Prompt) -> Embedding:
        if self.options.parts == "image" and self._family.text_limits:
            raise ModelError(
                f"model {shown(self.model_id)} has no text encoders (parts='image'): call encode_with first"
            )
        with quiet(self.pipeline):
            if prompt is None:
                return self._family.embed_nothing(self.device)
            return self._family.embed(prompt, self.device)

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> TextConditioning:
        guided = passes_per_eval(guidance_scale, classifier_free=self.classifier_free) == 2
        rows = self.embeddings([*([None] * len(prompts) if guided else []), *prompts])
        stacked = (torch.stack(column).to(self.device) for column in zip(*rows, strict=True))
        tensors = tuple(
            t.to(self._dtype) if t.is_floating_point() else t for t in stacked
        )  # an encoder may have another dtype
        return TextConditioning(tensors, len(prompts), guidance_scale, guided)

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are too long for every text encoder, so that their ends are cut."""
        limits = self._family.text_limits
        return sum(bool(limits) and all(count_tokens(t, prompt) > most for t, most in limits) for prompt in prompts)

    def sigmas(self, num_intervals: int, *, final_zero: bool = False) -> Tensor:
        return self._family.sigmas(num_intervals, final_zero, self.resolution)

    @property
    def shift(self) -> float | None:
        return self._family.shift(self.resolution)

    @property
    def published(self) -> bool:
        return self._family.published is not None

    def scheduler_grid(
        self, scheduler: str, num_intervals: int, *, final_zero: bool, changes: Mapping[str, Any]
    ) -> Grid:
        own = self.pipeline.scheduler
        if self.form == "flow" and scheduler == type(own).__name__:
            return Grid(self._family.sigmas(num_intervals, final_zero, self.resolution, changes))
        shift = changes.get("shift", self.shift)
        return scheduler_grid(
            own, scheduler, num_intervals, form=self.form, final_zero=final_zero, shift=shift, changes=changes
        )

    def published_grid(self, name: str, num_intervals: int) -> Grid:
        return published_grid(self._family.published, num_intervals, self.model_id)

    def noise(self, seed: int) -> Tensor:
        return torch.randn(
            self._family.latent_shape(self.resolution), generator=torch_generator(seed)
        )  # fmt: skip

    def initial(self, noise: Tensor) -> Tensor:
        return self._family.initial(noise.to(self.device))

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if not isinstance(conditioning, TextConditioning):
            raise TypeError(f"conditioning is a {type(conditioning).__name__}, expected what encode gave")
        scale = conditioning.guidance_scale

        def network(x: Tensor, sigma: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
            return self._family.network(x, sigma, tensors, scale)

        return guided_drift(network, x, sigma, conditioning)

    def guided(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, scale: Tensor | None, difference: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(conditioning, TextConditioning):
            raise TypeError(f"conditioning is a {type(conditioning).__name__}, expected what encode gave")
        return guided_at(
            self._family.network, x, sigma, conditioning, scale, difference, classifier_free=self.classifier_free
        )

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Tensor:
        images = self._family.images(x, self.resolution).float()
        if self.options.offload != "none":
            self.pipeline.maybe_free_model_hooks()
        images = images / 2 + 0.5
        return images.clamp(0, 1).masked_fill(images.isinf(), torch.nan)  # an overflow is not a white pixel


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Suppress the libraries' warnings about each cut prompt, which quote its text; `truncated` counts such prompts."""
    loggers = [logging.getLogger(name) for name in (type(pipeline).__module__, "transformers.tokenization_utils_base")]
    for logger in loggers:
        logger.addFilter(_is_error)  # setLevel would clear the cache of every logger, a millisecond per prompt
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def check_channels(network: Any, vae: Any, packed: int, model: str) -> None:
    """Refuse a network that takes or gives other channels than the latents have, such as one for inpainting.

    Args:
        network: the denoising network; None where it is not loaded.
        vae: the autoencoder; None where it is not loaded.
        packed: number of latent values of a channel that the network sees as one token's channels.
        model: name of the model, for messages.

    Raises:
        ModelError: the message names the numbers of channels.
    """
    if network is None or vae is None:
        return
    expected = packed * vae.config.latent_channels
    found = network.config.in_channels, network.config.get("out_channels") or network.config.in_channels
    if found != (expected, expected):
        raise ModelError(
            f"model {shown(model)}: its network takes {found[0]} channels and gives {found[1]}, but its latents have "
            f"{expected}: give a model for text to image"
        )


def _check_resolution(model: str, resolution: int, step: int) -> None:
    if resolution < step or resolution % step:
        use = max(resolution - resolution % step, step)
        raise ModelError(
            f"model {shown(model)}: resolution {resolution} is not a positive multiple of {step}: use {use}"
        )


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """The number of tokens of a prompt, uncut."""
    return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents in the scale of an AutoencoderKL; returns images [B, 3, H, W]."""
    images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return images
