"""Random-weight models of a few thousand parameters, saved in the layouts that people's real ones have."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from epd_ray.shapes.networks import make_tokenizer, text_config

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


def save_sd3(directory: Path, *, shift: float = 2.0, t5: bool = False) -> Path:
    """An SD3 pipeline for 16 px images: latents [4, 8, 8], joint attention over 64 channels."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8, qk_norm="rms_norm",
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
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


def save_clip(directory: Path, size: int = 32) -> Path:
    """A CLIPModel for images of `size` pixels, with its tokenizer and image processor."""
    tokenizer = make_tokenizer()
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
