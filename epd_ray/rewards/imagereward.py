"""ImageReward v1.0 (Xu et al. 2023): a BLIP model whose text encoder attends to the picture as it reads the prompt."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor

from epd_ray.errors import ModelError, shown
from epd_ray.rewards.batches import check_batch_size, in_batches, place
from epd_ray.rewards.checkpoints import (
    TOKENIZER_FILES,
    Tensors,
    check_loaded,
    companion,
    count_layers,
    find_file,
    linear_layers,
    part,
    read_tensors,
)
from epd_ray.rewards.preprocess import pil_pixels
from epd_ray.rewards.text import PromptTokenizer, open_tokenizer
from epd_ray.storage.documents import parse_record
from epd_ray.weights.hub import opening

CHECKPOINTS = ("ImageReward.safetensors", "ImageReward.pt")
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the network's output over ImageReward's training pictures
TEXT_LENGTH = 35
VISION_HEAD_WIDTH = 64

VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
VISION_PARTS = {"attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection", "norm": "layer_norm"}


class TextSizes(BaseModel):
    """The fields of med_config.json that say how BLIP's text encoder is built."""

    model_config = ConfigDict(strict=True)

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    max_position_embeddings: PositiveInt
    layer_norm_eps: PositiveFloat
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"]
    vocab_size: PositiveInt


class ImageRewardHead:
    """Scores human preference, standardised to mean 0 on ImageReward's training pictures; mostly between -2.5 and 2.

    Args:
        model: directory or hub id that holds ImageReward.pt or .safetensors, and med_config.json.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of both encoders ("auto": float16 on CUDA, else float32); later layers run in float32.
        batch_size: number of pictures per forward pass.
        tokenizer: directory or hub id of BERT's tokenizer; None takes the model directory if it holds one, else
            bert-base-uncased.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.

    Source: the published package's formula. (Some copies of its code add 3 standard deviations, 3.1.)
    """

    def __init__(
        self,
        *,
        model: str = "THUDM/ImageReward",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        tokenizer: str | None = None,
    ) -> None:
        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        self._device, self._dtype = place(device, dtype)
        tokenizer_source = companion(model, tokenizer, "google-bert/bert-base-uncased", TOKENIZER_FILES)
        with opening(model, "ImageReward model"):
            med = read_sizes(find_file(model, ["med_config.json"], revision), model)
            tensors = read_tensors(find_file(model, CHECKPOINTS, revision))
            vision = build_vision(part(tensors, "blip.visual_encoder."), model)
            text = build_text(part(tensors, "blip.text_encoder."), med, vision.config.hidden_size, model)
            layers = linear_layers(tensors, "mlp.layers.")
        bert_tokenizer = open_bert_tokenizer(tokenizer_source)
        if len(bert_tokenizer) > text.config.vocab_size:
            raise ModelError(
                f"tokenizer {shown(tokenizer_source)} has {len(bert_tokenizer)} tokens, ImageReward "
                f"model {shown(model)} has"
                f" {text.config.vocab_size}: give the tokenizer that the model was trained with"
            )
        self._tokens = PromptTokenizer(bert_tokenizer, TEXT_LENGTH, head="imagereward")
        self._vision = vision.to(self._device, self._dtype).eval().requires_grad_(False)
        self._text = text.to(self._device, self._dtype).eval().requires_grad_(False)
        self._layers = layers.to(self._device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    @torch.inference_mode()
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = pil_pixels(images, self._vision.config.image_size).to(self._device, self._dtype)
        tokens = self._tokens(prompts).to(self._device)
        patches = self._vision(pixel_values=pixels).last_hidden_state
        hidden = self._text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=self._device),
            is_decoder=False,  # no causal mask: each token attends to the whole prompt
        ).last_hidden_state
        raw: Tensor = self._layers(hidden[:, 0].float())
        return (raw.squeeze(-1) - MEAN) / STD


def open_bert_tokenizer(location: str) -> Any:
    """BERT's tokenizer, to which BLIP's two tokens "[DEC]" and "[ENC]" are added.

    Raises:
        ModelError: the tokenizer's files are missing.
    """
    from transformers import BertTokenizer

    tokenizer = open_tokenizer(BertTokenizer, location)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def build_vision(tensors: Tensors, model: str) -> Any:
    """BLIP's image encoder in float32; its layer sizes follow from the shapes of the weights.

    Raises:
        ModelError: weights are missing.
    """
    from transformers import BlipVisionConfig, BlipVisionModel

    tensors = {vision_name(key): value for key, value in tensors.items()}
    width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
    patches = tensors["embeddings.position_embedding"].shape[1] - 1
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=count_layers(tensors, "encoder.layers."),
        num_attention_heads=max(1, width // VISION_HEAD_WIDTH),
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # timm's value, which is not transformers' default
    )
    network, report = BlipVisionModel.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32,
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    check_loaded(report, f"ImageReward model {shown(model)}")
    return network


def vision_name(key: str) -> str:
    """The name that transformers gives to a weight, from timm's name."""
    if key in VISION_NAMES:
        return VISION_NAMES[key]
    key = re.sub(r"^blocks\.", "encoder.layers.", key)
    for theirs, ours in VISION_PARTS.items():
        key = key.replace(f".{theirs}", f".{ours}")
    return key


def read_sizes(path: Path, model: str) -> TextSizes:
    """Read a med_config.json.

    Raises:
        ModelError: the file is damaged, or lacks a field.
    """
    what = f"ImageReward model {shown(model)}: med_config.json"
    return parse_record(TextSizes, path.read_bytes(), what, ModelError, "fetch the published file again")


def build_text(tensors: Tensors, med: TextSizes, image_width: int, model: str) -> Any:
    """BLIP's text encoder in float32, with cross-attention to the image patches; med_config.json gives its sizes.

    Raises:
        ModelError: weights are missing.
    """
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    config = BlipTextConfig(
        **med.model_dump(), encoder_hidden_size=image_width, is_decoder=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, sep_token_id=None,
    )  # fmt: skip
    network, report = BlipTextModel.from_pretrained(
        None, add_pooling_layer=False, config=config, state_dict=tensors, dtype=torch.float32,
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    check_loaded(report, f"ImageReward model {shown(model)}")
    return network
