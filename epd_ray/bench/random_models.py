"""Diffusers pipelines of published architectures with random weights: their speed is measured without a download."""

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor

from epd_ray.backbones.architectures import ARCHITECTURES, SMALL_RESOLUTION, SMALL_VAE, VAE, Architecture
from epd_ray.backbones.cache import Embedding, Prompt
from epd_ray.backbones.index import FAMILIES
from epd_ray.backbones.loading import PipelineOptions, lay_out, speed_up
from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.errors import ConfigError
from epd_ray.randomness import seeded_construction, torch_generator
from epd_ray.registry import did_you_mean
from epd_ray.weights.devices import pick_device, pick_dtype

Size = Literal["full", "small"]


def random_backbone(
    name: str,
    size: Size,
    *,
    resolution: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
) -> PipelineBackbone:
    """A backbone without text encoders, in which the embedding of a prompt is random numbers seeded by its text.

    Args:
        name: one of ARCHITECTURES.
        size: "full" for the published networks, or "small" for networks of a few million parameters.
        resolution: pixels per side; None means that of the published model, or SMALL_RESOLUTION for a small one.
        device: "auto" (cuda, else mps, else cpu) or the name of a torch device.
        dtype: precision of the networks: "auto", "float32", "bfloat16" or "float16".
        compile: whether the network is compiled with torch.compile.

    Raises:
        ConfigError: the name, the device or the dtype is unknown.
        ModelError: the model cannot draw at this resolution.
    """
    import diffusers

    if name not in ARCHITECTURES:
        raise ConfigError([f"unknown architecture {name!r}{did_you_mean(name, ARCHITECTURES)}"])
    a, small = ARCHITECTURES[name], size == "small"
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    with seeded_construction(0), torch.device(place):
        network = getattr(diffusers, a.network)(**{**a.full, **(a.small if small else {})})
        vae = diffusers.AutoencoderKL(**{**VAE, **a.vae, **(SMALL_VAE if small else {})})
    for part in (network, vae):
        torch.nn.Module.to(part.eval().requires_grad_(False), kind)  # the pipeline's `to` warns of missing parts
    lay_out(vae, place)
    scheduler = getattr(diffusers, a.scheduler[0])(**a.scheduler[1])
    parts: dict[str, Any] = {**dict.fromkeys(a.parts), a.component: network, "vae": vae, "scheduler": scheduler}
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    pipeline = getattr(diffusers, a.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pixels = resolution or (SMALL_RESOLUTION if small else a.resolution)
    model = f"{name}-{size}-random"
    options = PipelineOptions(model, device=device, dtype=dtype, resolution=pixels, compile=compile)
    speed_up(network, options)
    family = FAMILIES.build(a.pipeline, {"pipeline": pipeline, "options": options})
    backbone = PipelineBackbone(pipeline, family, options)
    shapes = _embedding_shapes(a, network.config)
    backbone.encode_with(lambda prompt: _embedding(prompt, shapes, network.device, kind))
    return backbone


def _embedding_shapes(architecture: Architecture, config: Any) -> list[tuple[int, ...]]:
    """Shapes of the embedding of one prompt: its tokens, and a pooled vector where the network takes one."""
    tokens = (architecture.tokens, config.get("cross_attention_dim") or config.get("joint_attention_dim"))
    pooled = config.get("pooled_projection_dim")
    if config.get("addition_embed_type") == "text_time":  # the projection also takes six numbers about the size
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return [tokens] if pooled is None else [tokens, (pooled,)]


def _embedding(prompt: Prompt, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> Embedding:
    seed = int.from_bytes(hashlib.blake2b((prompt or "").encode(), digest_size=7).digest())
    generator = torch_generator(seed)
    made: list[Tensor] = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return tuple(made)
