"""Configurations of the published networks and of small ones of the same kind, to build them with random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Architecture:
    """A family's denoising network and VAE, and the shapes of their inputs.

    Attributes:
        pipeline: diffusers class of the pipeline.
        component: name of the network in the pipeline.
        network: diffusers class of the network.
        full: the network's configuration.
        small: changes to it for a machine without a GPU.
        scheduler: diffusers class and configuration of the scheduler.
        vae: configuration of an AutoencoderKL where it differs from VAE.
        resolution: pixels per side of the pictures that the published model draws.
        tokens: number of text tokens.
        parts: other components that the pipeline's constructor asks for.
    """

    pipeline: str
    component: str
    network: str
    full: Mapping[str, Any]
    small: Mapping[str, Any]
    scheduler: tuple[str, Mapping[str, Any]]
    vae: Mapping[str, Any]
    resolution: int
    tokens: int
    parts: tuple[str, ...]


VAE = {  # what the published VAEs have in common
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
}
SMALL_VAE = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
SIXTEEN_CHANNELS = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SMALL_RESOLUTION = 128
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
        {"latent_channels": 4, "scaling_factor": 0.18215},
        512,
        77,
        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
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
        {"latent_channels": 4, "scaling_factor": 0.13025},
        1024,
        77,
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
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
        {**SIXTEEN_CHANNELS, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        1024,
        333,
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
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
        {**SIXTEEN_CHANNELS, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        1024,
        512,
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
}
