"""Stable Diffusion 3 and 3.5, and every model in their diffusers layout."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from epd_ray.assets import require_vocabulary, resolve_model
from epd_ray.backbones.cache import Embedding, EmbeddingCache
from epd_ray.devices import pick_device, pick_dtype
from epd_ray.errors import ModelError
from epd_ray.types import Form

PIPELINE = "StableDiffusion3Pipeline"


@dataclass(frozen=True)
class SD3Conditioning:
    """Encoded prompts; with guidance, the first `len(self)` rows of each tensor are the empty prompt's.

    Attributes:
        embeds: [B, T, D], or [2B, T, D] with guidance.
        pooled: [B, P], or [2B, P] with guidance.
        guidance_scale: weight of the prompt against the empty one; at most 1 means no guidance.
    """

    embeds: Tensor
    pooled: Tensor
    guidance_scale: float

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    def __len__(self) -> int:
        return len(self.embeds) // (2 if self.guided else 1)

    def repeat(self, k: int) -> "SD3Conditioning":
        return SD3Conditioning(
            self.embeds.repeat_interleave(k, 0), self.pooled.repeat_interleave(k, 0), self.guidance_scale
        )


class SD3Backbone:
    """Drives a StableDiffusion3Pipeline as an ODE in sigma.

    The network runs in `dtype`; the solver's state, guidance and noise stay float32.

    Args:
        model: a pipeline directory, a hub id, or the name of an embedded model.
        device: "auto" (cuda, mps, cpu), or a torch device.
        dtype: "auto" (bfloat16), "float32", "bfloat16" or "float16".
        resolution: pixels per side; the model's own when None.
        max_sequence_length: T5 tokens (empty ones where the pipeline has no T5), as in the pipeline's call.
        embedding_cache_mib: bound on the cached prompt embeddings.

    Raises:
        ModelError: the model is missing, damaged, or not an SD3 pipeline.
    """

    family = "sd3"
    form: Form = "flow"

    def __init__(
        self,
        *,
        model: str,
        device: str = "auto",
        dtype: str = "auto",
        resolution: int | None = None,
        max_sequence_length: int = 256,
        embedding_cache_mib: int = 1024,
    ) -> None:
        self.model_id = model
        self.device, self.dtype = pick_device(device), pick_dtype(dtype)
        self.pipeline = load_sd3_pipeline(model, self.dtype).to(self.device)
        self.max_sequence_length = max_sequence_length
        transformer = self.pipeline.transformer.config
        size = resolution or transformer.sample_size * self.pipeline.vae_scale_factor
        step = self.pipeline.vae_scale_factor * transformer.patch_size
        if size % step:
            raise ModelError(f"resolution {size} is not a multiple of {step}: use {size - size % step}")
        side = size // self.pipeline.vae_scale_factor
        self.latent_shape = (transformer.in_channels, side, side)
        self._embeddings = EmbeddingCache(self._encode_one, embedding_cache_mib << 20)

    @torch.inference_mode()
    def _encode_one(self, prompt: str) -> Embedding:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return embeds[0], pooled[0]

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> SD3Conditioning:
        empty = [""] * len(prompts) if guidance_scale > 1 else []
        embeds, pooled = zip(*self._embeddings([*empty, *prompts]), strict=True)
        return SD3Conditioning(torch.stack(embeds), torch.stack(pooled), guidance_scale)

    def sigmas(self, num_intervals: int, *, final_zero: bool = False) -> Tensor:
        """The pipeline scheduler's own sigmas; without `final_zero` one step more, whose end at 0 is dropped."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        steps = num_intervals if final_zero else num_intervals + 1
        scheduler.set_timesteps(steps)
        sigmas: Tensor = scheduler.sigmas[: num_intervals + 1].double()
        return sigmas

    def noise(self, seed: int) -> Tensor:
        return torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed))

    def initial(self, noise: Tensor) -> Tensor:
        return noise.to(self.device)  # flow matching starts at sigma = 1: x = noise

    @torch.inference_mode()
    def drift(self, x: Tensor, sigma: Tensor, conditioning: SD3Conditioning) -> Tensor:
        """The network's velocity, which is the drift of flow matching; both guidance halves in one forward."""
        copies = 2 if conditioning.guided else 1
        velocity: Tensor = self.pipeline.transformer(
            hidden_states=x.to(self.dtype).repeat(copies, 1, 1, 1),
            timestep=(1000 * sigma).float().repeat(copies),
            encoder_hidden_states=conditioning.embeds,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0].float()
        if not conditioning.guided:
            return velocity
        empty, text = velocity.chunk(2)
        return empty + conditioning.guidance_scale * (text - empty)

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = x / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1).cpu()


def load_sd3_pipeline(model: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]  # diffusers ships no types
    """Open an SD3 pipeline from a directory, a hub id or an embedded model's name.

    Raises:
        ModelError: with what is wrong and where.
    """
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
    from diffusers.utils import is_accelerate_available

    location = resolve_model(model)
    try:
        index = DiffusionPipeline.load_config(location)
        if index.get("_class_name") != PIPELINE:
            raise ModelError(
                f"model {model!r} is a {index.get('_class_name')}, not a {PIPELINE}: set backbone.family to match"
            )
        without_t5 = index.get("text_encoder_3", [None])[0] is None
        absent = {"text_encoder_3": None, "tokenizer_3": None} if without_t5 else {}
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            location, torch_dtype=dtype, low_cpu_mem_usage=is_accelerate_available(), **absent
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(f"model {model!r} cannot be opened: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise ModelError(f"model {model!r} has a damaged weight file: {_first_line(error)}") from error
        raise
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3)
    require_vocabulary(model, [t for t in tokenizers if t is not None])
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        # Without accelerate, diffusers may leave a network in its file's dtype, whatever torch_dtype says.
        part.to(dtype=dtype).requires_grad_(False)
    return pipeline


def _first_line(error: Exception) -> str:
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    text = f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
    return text.replace(os.fspath(Path.home()), "~")
