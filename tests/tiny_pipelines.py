"""Random-weight pipelines of the classes that have no adapter, built from configurations alone, for 16 or 32 px."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from epd_ray.embedded.networks import make_tokenizer, text_config
from epd_ray.embedded.scenes import WORDS
from tests.tiny_models import WIDTH, tiny_t5, tiny_vae

WIDE = 2 * WIDTH  # of the text embeddings
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
LANGUAGE = {
    "hidden_size": WIDE, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "max_position_embeddings": 2048,
}  # fmt: skip


def chat_tokenizer() -> T5Tokenizer:
    """A tokenizer of letters with a template for chats, for the encoders that are language models."""
    tokenizer = tiny_t5()[1]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def language(kind: Any, config: Any, **more: Any) -> tuple[Any, T5Tokenizer]:
    tokenizer = chat_tokenizer()
    return kind(config(vocab_size=len(tokenizer), **LANGUAGE, **more)), tokenizer


def umt5() -> tuple[UMT5EncoderModel, T5Tokenizer]:
    tokenizer = tiny_t5()[1]
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=WIDE, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return UMT5EncoderModel(config), tokenizer


def qwen_vl() -> tuple[Qwen2_5_VLForConditionalGeneration, T5Tokenizer]:
    tokenizer = chat_tokenizer()
    text = {
        "vocab_size": len(tokenizer), **LANGUAGE,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDE,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    ids = {"image_token_id": 1, "video_token_id": 1, "vision_start_token_id": 1, "vision_end_token_id": 1}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    ), tokenizer


def short_template(pipeline: Any) -> Any:
    """The encoder's tokenizer has letters alone, so that the published template would be 200 tokens."""
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "draw {}", 4
    return pipeline


def qwen_image() -> QwenImagePipeline:
    encoder, tokenizer = qwen_vl()
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDE, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.1, 0.9, 1.2, 1.0],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    return short_template(QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer))


def flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDE, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def flux2_klein() -> Flux2KleinPipeline:
    encoder, tokenizer = language(Qwen3ForCausalLM, Qwen3Config)
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return Flux2KleinPipeline(scheduler, flux2_vae(), encoder, tokenizer, flux2_transformer(False))


def flux2() -> Flux2Pipeline:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    text = {"model_type": "mistral", "vocab_size": len(tokenizer), **LANGUAGE}
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return Flux2Pipeline(
        FlowMatchEulerDiscreteScheduler(**DYNAMIC), flux2_vae(), encoder, tokenizer, flux2_transformer(True)
    )  # fmt: skip


def z_image() -> ZImagePipeline:
    encoder, tokenizer = language(Qwen3ForCausalLM, Qwen3Config)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDE,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(4, 0.06), encoder, tokenizer, transformer
    )  # fmt: skip


def chroma() -> ChromaPipeline:
    encoder, tokenizer = tiny_t5()
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDE, axes_dims_rope=(4, 6, 6), approximator_num_channels=8, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return ChromaPipeline(scheduler, tiny_vae(4, 0.06), encoder, tokenizer, transformer)


def sana() -> SanaPipeline:
    encoder, tokenizer = language(Gemma2Model, Gemma2Config)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDE,
        sample_size=8,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(tokenizer, encoder, vae, transformer, scheduler)


def lumina2() -> Lumina2Pipeline:
    encoder, tokenizer = language(Gemma2Model, Gemma2Config)
    transformer = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(300, 32, 32), cap_feat_dim=WIDE,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    vae = AutoencoderKL(  # this pipeline's latents are always an eighth of the picture's side
        block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, shift_factor=0.06,
        scaling_factor=0.8,
    )  # fmt: skip
    return Lumina2Pipeline(transformer, scheduler, vae, encoder, tokenizer)


def hunyuan_image() -> HunyuanImagePipeline:
    encoder, tokenizer = qwen_vl()
    glyph_encoder, glyph_tokenizer = tiny_t5()
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=WIDE, text_embed_2_dim=WIDE, rope_axes_dim=(8, 8),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16, scaling_factor=0.75,
    )  # fmt: skip
    pipeline = HunyuanImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=5.0), vae, encoder, tokenizer, glyph_encoder, glyph_tokenizer,
        transformer, ClassifierFreeGuidance(guidance_scale=3.5),
    )  # fmt: skip
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 24, 8  # it pads to them
    return short_template(pipeline)


def hidream() -> HiDreamImagePipeline:
    clip_tokenizer = make_tokenizer(WORDS)
    clips = [CLIPTextModelWithProjection(text_config(clip_tokenizer, WIDTH, n)) for n in (2, 3)]
    t5, t5_tokenizer = tiny_t5()
    llama, llama_tokenizer = language(LlamaForCausalLM, LlamaConfig, attn_implementation="eager")
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[WIDE, WIDE], text_emb_dim=2 * WIDTH, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(8, 8), llama_layers=[0, 1],
        force_inference_output=True,
    )  # fmt: skip
    pipeline = HiDreamImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(4, 0.06), clips[0], clip_tokenizer, clips[1],
        clip_tokenizer, t5, t5_tokenizer, llama, llama_tokenizer, transformer,
    )  # fmt: skip
    pipeline.default_sample_size = 8  # it draws as many pixels, whatever it is asked for
    return pipeline


def cogview4() -> CogView4Pipeline:
    encoder, tokenizer = language(GlmModel, GlmConfig)
    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, text_embed_dim=WIDE,
        time_embed_dim=16, condition_dim=8, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    return CogView4Pipeline(tokenizer, encoder, tiny_vae(4, None), transformer, scheduler)


def aura_flow() -> AuraFlowPipeline:
    encoder, tokenizer = umt5()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDE, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return AuraFlowPipeline(tokenizer, encoder, tiny_vae(4, None), transformer, scheduler)


def pixart() -> PixArtSigmaPipeline:
    encoder, tokenizer = tiny_t5()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=32, sample_size=8, caption_channels=WIDE, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtSigmaPipeline(tokenizer, encoder, tiny_vae(4, None), transformer, scheduler)


def wan(networks: int = 1) -> WanPipeline:
    encoder, tokenizer = umt5()
    size = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": WIDE,
        "freq_dim": 32, "ffn_dim": 64, "num_layers": 1, "rope_max_seq_len": 32,
    }  # fmt: skip
    first, *second = [WanTransformer3DModel(**size) for _ in range(networks)]
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.1, 0.9, 1.2, 1.0], scale_factor_temporal=4,
        scale_factor_spatial=2,
    )  # fmt: skip
    more = {"transformer_2": second[0], "boundary_ratio": 0.875} if second else {}
    return WanPipeline(tokenizer, encoder, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), first, **more)


def wan22() -> WanPipeline:
    """Wan 2.2: another network from a noise level on."""
    return wan(networks=2)


def ltx() -> LTXPipeline:
    encoder, tokenizer = tiny_t5()
    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=WIDE,
    )  # fmt: skip
    blocks = 2
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * blocks, decoder_block_out_channels=(8,) * blocks,
        down_block_types=("LTXVideoDownBlock3D",) * blocks, layers_per_block=(1,) * (blocks + 1),
        decoder_layers_per_block=(1,) * (blocks + 1), spatio_temporal_scaling=(True,) + (False,) * (blocks - 1),
        decoder_spatio_temporal_scaling=(True,) + (False,) * (blocks - 1), downsample_type=("conv",) * blocks,
        decoder_inject_noise=(False,) * (blocks + 1), upsample_residual=(False,) * blocks,
        upsample_factor=(1,) * blocks, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(**DYNAMIC), vae, encoder, tokenizer, transformer)


BUILDERS: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        qwen_image, flux2, flux2_klein, z_image, chroma, sana, lumina2, hunyuan_image, hidream, cogview4, aura_flow,
        pixart, wan, wan22, ltx,
    )
}  # fmt: skip
PIXELS = dict.fromkeys(BUILDERS, 16) | {"sana": 32, "lumina2": 64, "ltx": 32}
CALLS: dict[str, dict[str, Any]] = {  # what the small models need beside a prompt
    "flux2_klein": {"text_encoder_out_layers": [1, 2, 3]},
    "flux2": {"text_encoder_out_layers": [1, 2, 3], "max_sequence_length": 320},
    "lumina2": {"system_prompt": "draw", "max_sequence_length": 64},
    "sana": {"complex_human_instruction": [], "use_resolution_binning": False},
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
}


def make(name: str) -> Any:
    """A pipeline with random weights from a seed of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(100 + list(BUILDERS).index(name))
        pipeline = BUILDERS[name]()
        for network in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
            for parameter in [] if network is None else network.parameters():
                if parameter.count_nonzero() == 0:  # some begin as zeros, and would hide time and prompt
                    torch.nn.init.normal_(parameter, std=0.1)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(name: str, directory: Path) -> Path:
    make(name).save_pretrained(directory)
    return directory
