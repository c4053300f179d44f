"""The networks of the embedded models, as small instances of the usual diffusers and transformers classes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

Network = TypeVar("Network", bound=nn.Module)

TOKENS = 20  # the longest caption has 18 words, which are 20 tokens with start and end


def make_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE tokenizer with one token for each of the words; other text is split into bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    endings = [f"{letter}</w>" for letter in sorted(alphabet)]
    trainer = BpeTrainer(
        vocab_size=10_000, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False,
        special_tokens=[*endings, "<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    bpe.train_from_iterator(sorted(words), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TOKENS)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """The token ids [B, 20] of B captions, int64, padded as in the SD3 pipeline."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def make_vae() -> AutoencoderKL:
    """An autoencoder that maps pictures [B, 3, 64, 64] to latents [B, 8, 16, 16]."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=8, norm_num_groups=16, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = text_config(tokenizer, 128, 3)
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, projection_dim=128, num_hidden_layers=5, num_attention_heads=4,
        image_size=64, patch_size=8,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def make_features() -> CLIPModel:
    """A CLIPModel of which only the image tower is trained, and used: its text tower is as small as can be."""
    text = CLIPTextConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, projection_dim=64, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, projection_dim=64, num_hidden_layers=4, num_attention_heads=4,
        image_size=64, patch_size=8,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


class Denoiser(nn.Module):
    """The transformer and its two text encoders, which are trained together and saved separately in the pipeline."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=6, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128,
            pos_embed_max_size=16, qk_norm="rms_norm",
        )  # fmt: skip
        self.text_encoder = CLIPTextModelWithProjection(text_config(tokenizer, 64, 3))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(tokenizer, 64, 4))
        for name, parameter in self.transformer.named_parameters():  # adaLN-zero: every block starts as identity
            if name.endswith(("norm1.linear.weight", "norm1.linear.bias", "norm1_context.linear.weight",
                              "norm1_context.linear.bias", "norm_out.linear.weight", "proj_out.weight")):  # fmt: skip
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor, empty: int) -> Tensor:
        """The velocity [B, 8, 16, 16] at latents x and sigma [B].

        Args:
            x: [B, 8, 16, 16].
            sigma: [B], in [0, 1].
            tokens: token ids [B, 20].
            empty: number of zero tokens that take the place of SD3's third text encoder, T5.
        """
        outs = [e(tokens, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        hidden = torch.cat([o.hidden_states[-2] for o in outs], dim=-1)
        hidden = torch.cat([hidden, hidden.new_zeros(len(x), empty, hidden.shape[-1])], dim=1)
        pooled = torch.cat([o.text_embeds for o in outs], dim=-1)
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return velocity


def load_ema(module: Network, path: Path) -> Network:
    """Load the averaged (EMA) weights of a training stage into its module.

    Raises:
        FileNotFoundError: the stage has not run.
        ValueError: the checkpoint lacks a parameter of the module.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the {path.stem} stage of its script in jobs/ first")
    average = torch.load(path, weights_only=True)["ema"]
    if missing := {name for name, _ in module.named_parameters()} - average.keys():
        raise ValueError(f"{path} lacks {min(missing)} and {len(missing) - 1} more: is it another stage's checkpoint?")
    module.load_state_dict(average, strict=False)  # which has no buffers
    return module.eval()


def load_part(name: str, module: Network, path: Path) -> Network:
    """The same for one of the parts of a stage that trains several, such as a network and a layer that reads it."""
    load_ema(nn.ModuleDict({name: module}), path)
    return module
