"""Random-weight models of a few thousand parameters, saved in the layouts that people's real ones have."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from epd_ray.embedded.networks import make_tokenizer, text_config
from epd_ray.embedded.scenes import WORDS

TOKENS = 20
WIDTH = 32


def tiny_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁blue", "▁circle", "▁star", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        dropout_rate=0.0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


def save_sd3(directory: Path, *, shift: float = 2.0, t5: bool = False, channels: int = 4) -> Path:
    """An SD3 pipeline for 16 px images: latents [channels, 8, 8], joint attention over 64 channels."""
    tokenizer = make_tokenizer(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8, qk_norm="rms_norm",
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=channels, norm_num_groups=4,
            sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06,
        )  # fmt: skip
        encoders = [CLIPTextModelWithProjection(text_config(tokenizer, WIDTH, n)) for n in (2, 3)]
        t5_encoder, t5_tokenizer = tiny_t5() if t5 else (None, None)
    StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder, tokenizer_3=t5_tokenizer,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def tiny_vae(channels: int, shift: float | None, *, quant: bool = False) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=quant, use_post_quant_conv=quant, scaling_factor=0.8, shift_factor=shift, force_upcast=False,
    )  # fmt: skip


def tiny_unet(cross_attention: int, **options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{"in_channels": 4, **options}, sample_size=8, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def save_sd(directory: Path, *, prediction_type: str = "epsilon", **network: object) -> Path:
    """A Stable Diffusion 1.5 or (with v prediction) 2.1 pipeline for 16 px images: latents [4, 8, 8]."""
    tokenizer = make_tokenizer(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        unet = tiny_unet(WIDTH, **network)
        vae = tiny_vae(4, None, quant=True)
        text_encoder = CLIPTextModel(text_config(tokenizer, WIDTH, 2))
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        scheduler=PNDMScheduler(**SD_BETAS, skip_prk_steps=True, prediction_type=prediction_type),
    ).save_pretrained(directory)  # fmt: skip
    return directory


def save_sdxl(directory: Path, **network: object) -> Path:
    """An SDXL pipeline for 16 px images: two text encoders, sizes embedded, zeros for the empty prompt."""
    tokenizer = make_tokenizer(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = tiny_unet(
            2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=1,
            use_linear_projection=True, projection_class_embeddings_input_dim=WIDTH + 6 * 8, **network,
        )  # fmt: skip
        vae = tiny_vae(4, None, quant=True)
        first = CLIPTextModel(text_config(tokenizer, WIDTH, 2))
        second = CLIPTextModelWithProjection(text_config(tokenizer, WIDTH, 3))
    StableDiffusionXLPipeline(
        unet=unet, vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=tokenizer, tokenizer_2=tokenizer,
        scheduler=PNDMScheduler(**SD_BETAS, skip_prk_steps=True),
    ).save_pretrained(directory)  # fmt: skip
    return directory


def save_flux(directory: Path, *, guidance_embeds: bool = True) -> Path:
    """A FLUX.1-dev pipeline for 16 px images: latents [4, 8, 8] packed to 16 tokens of 16 channels."""
    tokenizer = make_tokenizer(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        vae = tiny_vae(4, 0.06)
        text_encoder = CLIPTextModel(text_config(tokenizer, WIDTH, 2))
        t5_encoder, t5_tokenizer = tiny_t5()
    pipeline = FluxPipeline(
        transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
        text_encoder_2=t5_encoder, tokenizer_2=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=4,
            max_image_seq_len=64,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(directory)
    return directory


def save_ddpm(directory: Path, *, scheduler: DDPMScheduler | None = None, **network: object) -> Path:
    """An unconditional pixel model, as google/ddpm-cifar10-32: images of 16 px."""
    sizes: dict[str, object] = {"sample_size": 16, "in_channels": 3, "out_channels": 3}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet = UNet2DModel(
            **{**sizes, **network}, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        )  # fmt: skip
    DDPMPipeline(unet=unet, scheduler=scheduler or DDPMScheduler()).save_pretrained(directory)
    return directory


def save_ldm(directory: Path) -> Path:
    """An unconditional latent model, as CompVis/ldm-celebahq-256: images of 16 px, latents [3, 8, 8]."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        unet = UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=8,
        )  # fmt: skip
        vqvae = VQModel(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4, num_vq_embeddings=32,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    LDMPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler).save_pretrained(directory)
    return directory


def save_clip(directory: Path, size: int = 32) -> Path:
    """A CLIPModel for images of `size` pixels, with its tokenizer and image processor."""
    tokenizer = make_tokenizer(WORDS)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        image_size=size, patch_size=8,
    )  # fmt: skip
    text = text_config(tokenizer, WIDTH, 2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
        CLIPModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        directory
    )
    return directory
