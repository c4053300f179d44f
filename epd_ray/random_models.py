"""Pipelines with random weights, built from configurations: what a speed measurement needs, without a download."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from epd_ray.backbones.auto import FAMILIES
from epd_ray.backbones.conditioning import TextConditioning
from epd_ray.backbones.loading import PipelineOptions
from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.devices import pick_device, pick_dtype
from epd_ray.errors import ConfigError
from epd_ray.registry import did_you_mean

Size = Literal["full", "small"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Architecture:
    """A family's denoising network and the shapes of its inputs.

    Attributes:
        pipeline: diffusers class.
        component: name of the network in it.
        network: diffusers class.
        full: its configuration.
        small: what is different for a machine without a GPU.
        scheduler: diffusers class and configuration.
        tokens: of the text.
        parts: other components that the pipeline's constructor asks for.
    """

    pipeline: str
    component: str
    network: str
    full: Mapping[str, Any]
    small: Mapping[str, Any]
    scheduler: tuple[str, Mapping[str, Any]]
    tokens: int
    parts: tuple[str, ...]


SMALL_UNET = {"block_out_channels": (64, 128), "attention_head_dim": 8, "cross_attention_dim": 64}
ARCHITECTURES = {
    "sd15": Architecture(
        "StableDiffusionPipeline",
        "unet",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        {
            **SMALL_UNET,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        ("EulerDiscreteScheduler", BETAS),
        77,
        ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
    ),
    "sdxl": Architecture(
        "StableDiffusionXLPipeline",
        "unet",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            **SMALL_UNET,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
        },
        ("EulerDiscreteScheduler", BETAS),
        77,
        ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
    "sd3": Architecture(
        "StableDiffusion3Pipeline",
        "transformer",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {
            "num_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 128,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 128,
        },
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        333,
        ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    ),
    "flux": Architecture(
        "FluxPipeline",
        "transformer",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 128,
            "axes_dims_rope": (8, 12, 12),
        },
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        512,
        ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
}


def random_backbone(
    name: str, size: Size, *, resolution: int, device: str = "auto", dtype: str = "auto"
) -> PipelineBackbone:
    """A backbone without text encoders and VAE: `sigmas`, `noise`, `initial` and `drift` work.

    Args:
        name: one of ARCHITECTURES.
        size: "full", the published network, or "small", a few million parameters.
        resolution: pixels per side.
        device: as everywhere.
        dtype: of the network.

    Raises:
        ConfigError: an unknown name, device or dtype.
    """
    import diffusers

    if name not in ARCHITECTURES:
        raise ConfigError([f"unknown architecture {name!r}{did_you_mean(name, ARCHITECTURES)}"])
    a = ARCHITECTURES[name]
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    config = {**a.full, **(a.small if size == "small" else {})}
    with torch.random.fork_rng(), torch.device(place):
        torch.manual_seed(0)
        network = getattr(diffusers, a.network)(**config).eval().requires_grad_(False)
    if kind != torch.float32:
        network.to(kind)
    scheduler = getattr(diffusers, a.scheduler[0])(**a.scheduler[1])
    parts: dict[str, Any] = {**dict.fromkeys(a.parts), a.component: network, "scheduler": scheduler}
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    pipeline = getattr(diffusers, a.pipeline)(**parts)
    options = PipelineOptions(f"{name}-{size}-random", device=device, dtype=dtype, resolution=resolution)
    family = FAMILIES.build(a.pipeline, {"pipeline": pipeline, "options": options})
    return PipelineBackbone(pipeline, family, options)


def random_conditioning(
    backbone: PipelineBackbone, name: str, batch: int, guidance_scale: float | None = None
) -> TextConditioning:
    """Random text of `batch` prompts, with the guidance that the family is usually run with unless one is given."""
    a, network = ARCHITECTURES[name], getattr(backbone.pipeline, ARCHITECTURES[name].component)
    scale = backbone.default_guidance if guidance_scale is None else guidance_scale
    guided = name != "flux" and scale > 1
    rows, config = batch * (2 if guided else 1), network.config
    width = config.get("cross_attention_dim") or config.get("joint_attention_dim")
    made = [_normal(network, rows, a.tokens, width)]
    if name == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        made.append(_normal(network, rows, pooled))
    elif name in ("sd3", "flux"):
        made.append(_normal(network, rows, config.pooled_projection_dim))
    return TextConditioning(tuple(made), batch, scale, guided)


def _normal(network: Any, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(network.device, network.dtype)
