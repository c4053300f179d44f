"""MPS, the multi-dimensional preference score (Zhang et al. 2024), with its condition for overall preference."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention, silu

from epd_ray.errors import ModelError, shown
from epd_ray.rewards.batches import check_batch_size, in_batches, place
from epd_ray.rewards.checkpoints import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    Tensors,
    companion,
    count_layers,
    find_file,
    part,
    read_tensors,
)
from epd_ray.rewards.pickscore import LAION
from epd_ray.rewards.text import PromptTokenizer, open_tokenizer
from epd_ray.rewards.towers import open_clip_processor
from epd_ray.rewards.vit_h import build_clip
from epd_ray.weights.hub import opening

CHECKPOINTS = ("MPS_overall_checkpoint.safetensors", "model.safetensors", "MPS_overall_checkpoint.pth")
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3
"""A prompt token is masked when its similarity to the condition is at most this share of the prompt's largest one."""


class MpsHead:
    """Scores by exp(logit_scale) * cosine of the prompt's embedding and an image embedding that depends on the prompt.

    Args:
        model: directory or hub id that holds MPS_overall_checkpoint.safetensors or model.safetensors. The published
            MPS_overall_checkpoint.pth is a pickle: convert it to safetensors with `epd-ray rewards convert mps`.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": float16 on CUDA, else float32); the cosine is computed in float32.
        batch_size: number of pictures per forward pass.
        processor: directory or hub id of tokenizer and image processor; None takes the model directory if it holds
            them, else LAION, which MPS was fine-tuned from.
        condition: words that describe what the score is about; prompt tokens unlike all of them are masked.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.
    """

    def __init__(
        self,
        *,
        model: str = "RE-N-Y/mpsv1",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        processor: str | None = None,
        condition: str = CONDITION,
    ) -> None:
        from transformers import CLIPTokenizer

        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        self._device, self._dtype = place(device, dtype)
        tokenizer_source = companion(model, processor, LAION, TOKENIZER_FILES)
        processor_source = companion(model, processor, LAION, PROCESSOR_FILES)
        with opening(model, "MPS model"):
            tensors = read_mps(model, revision)
            network = build_clip(part(tensors, "model."), f"MPS model {shown(model)}")
            cross = build_cross(part(tensors, "cross_model."), model)
        with opening(processor_source, "image processor"):
            self._pixels = open_clip_processor(processor_source)
        self._scale = float(network.logit_scale.detach().exp())
        self._network = network.to(self._device, self._dtype).eval().requires_grad_(False)
        self._cross = cross.to(self._device, self._dtype)
        tokenizer = open_tokenizer(CLIPTokenizer, tokenizer_source)
        length = network.config.text_config.max_position_embeddings
        self._tokens = PromptTokenizer(tokenizer, length, head="mps")
        self._condition = self._embed([condition])[0][0]  # [T, D]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    @torch.inference_mode()
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self._pixels(images).to(self._device, self._dtype)
        tokens, sentence = self._embed(prompts)
        # MPS projects the last layer's output without the layer norm that CLIP applies to its first patch.
        patches = self._network.visual_projection(self._network.vision_model(pixel_values=pixels).last_hidden_state)
        mask = relevant(tokens.float(), self._condition.float())
        picture = self._cross(patches, tokens, mask)[:, 0]
        return self._scale * cosine_similarity(sentence.float(), picture.float(), dim=-1)

    @torch.inference_mode()
    def _embed(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of every token [B, T, D] and of the whole prompt [B, D]."""
        # Without an attention mask, because the model was trained with attention to padding tokens.
        out = self._network.text_model(input_ids=self._tokens(prompts).input_ids.to(self._device))
        project = self._network.text_projection
        return project(out.last_hidden_state), project(out.pooler_output)


def relevant(tokens: Tensor, condition: Tensor) -> Tensor:
    """Mask [B, T], True for the prompt tokens [B, T, D] that are similar to the condition's tokens [C, D].

    The most similar token of each prompt is always True.
    """
    similarity = (tokens @ condition.T).amax(dim=-1)
    mask: Tensor = similarity / similarity.amax(dim=-1, keepdim=True) > THRESHOLD
    return mask


def read_mps(model: str, revision: str | None) -> Tensors:
    """The model's state dict: names with prefix "model." are a CLIPModel's, "cross_model." the cross-attention layers'.

    Raises:
        ModelError: the file is missing or damaged, or is the published pickle.
    """
    path = find_file(model, CHECKPOINTS, revision)
    convert = f"convert it once: epd-ray rewards convert mps {path} {path.with_suffix('.safetensors')}"
    tensors = read_tensors(path, convert)
    tensors = part(tensors, "mps.") or tensors  # the default repository puts this prefix before all names
    return {key: value for key, value in tensors.items() if not key.endswith(".position_ids")}


class CrossLayer(nn.Module):
    """The image patches attend to the prompt, then to each other; each attention is parallel to a SwiGLU layer.

    All attention heads share one key and one value per token.

    Args:
        dim: width of patches and tokens.
        head: width of an attention head.
        heads: number of attention heads.
        inner: inner width of the feed-forward layers.

    Source: Kwai-Kolors/MPS, Cross_model; the parallel layers are PaLM's.
    """

    def __init__(self, dim: int, head: int, heads: int, inner: int) -> None:
        super().__init__()
        self.widths = (heads * head, head, head, 2 * inner)
        self.heads = heads
        self.cross_norm, self.self_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head, bias=False)
        self.key_value = nn.Linear(dim, 2 * head, bias=False)
        self.cross_out = nn.Linear(heads * head, dim, bias=False)
        self.cross_up = nn.Linear(dim, 2 * inner, bias=False)
        self.cross_down = nn.Linear(inner, dim, bias=False)
        self.fused = nn.Linear(dim, sum(self.widths), bias=False)
        self.self_out = nn.Linear(heads * head, dim, bias=False)
        self.self_down = nn.Linear(inner, dim, bias=False)

    def forward(self, patches: Tensor, tokens: Tensor, mask: Tensor, angles: Tensor) -> Tensor:
        """New patches [B, P, D].

        Args:
            patches: [B, P, D].
            tokens: [B, T, D].
            mask: [B, T], bool, True for the tokens that patches attend to.
            angles: [P, head], the rotary angles of the patches.
        """
        x = self.cross_norm(patches)
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        attended = self._attend(self.query(x), key, value, mask[:, None, None])
        patches = patches + self.cross_out(attended) + self.cross_down(gate(self.cross_up(x)))
        query, key, value, up = self.fused(self.self_norm(patches)).split(self.widths, dim=-1)
        attended = self._attend(query, key, value, None, angles)
        mixed: Tensor = patches + self.self_out(attended) + self.self_down(gate(up))
        return mixed

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, angles: Tensor | None = None
    ) -> Tensor:
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, P, head]
        key, value = key[:, None], value[:, None]  # [B, 1, T, head]
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        shape = (-1, self.heads, -1, -1)
        out = scaled_dot_product_attention(query, key.expand(shape), value.expand(shape), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


class CrossModel(nn.Module):
    """A sequence of CrossLayers, with rotary angles for the patches.

    Args:
        layers: the layers in order.
        frequencies: [head / 2], rotary frequencies in the checkpoint's precision.
    """

    def __init__(self, layers: list[CrossLayer], frequencies: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.frequencies = frequencies  # not a buffer, because to() would round a buffer

    def forward(self, patches: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        # In the precision of the checkpoint's frequencies, because the network was trained with angles so rounded.
        steps = torch.arange(patches.shape[1], dtype=self.frequencies.dtype)
        angles = torch.outer(steps, self.frequencies).repeat(1, 2).to(patches.device)
        for layer in self.layers:
            patches = layer(patches, tokens, mask, angles)
        return patches


def gate(x: Tensor) -> Tensor:
    """SwiGLU: the first half of the last dimension times the swish of the second half."""
    value, switch = x.chunk(2, dim=-1)
    return value * silu(switch)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding of [..., P, head] by angles [P, head]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


LAYER_NAMES = {
    "0.fn.norm": "cross_norm",
    "0.fn.to_q": "query",
    "0.fn.to_kv": "key_value",
    "0.fn.to_out": "cross_out",
    "0.fn.ff.0": "cross_up",
    "0.fn.ff.2": "cross_down",
    "1.fn.norm": "self_norm",
    "1.fn.fused_attn_ff_proj": "fused",
    "1.fn.attn_out": "self_out",
    "1.fn.ff_out.1": "self_down",
}


def build_cross(tensors: Tensors, model: str) -> Any:
    """The cross-attention layers in float32; their sizes follow from the shapes of the weights.

    Raises:
        ModelError: weights are missing, or have shapes that do not fit together.
    """
    try:
        inner_heads, dim = tensors["layers.0.0.fn.to_q.weight"].shape
        head = len(tensors["layers.0.0.fn.to_kv.weight"]) // 2
        inner = tensors["layers.0.0.fn.ff.2.weight"].shape[1]
        frequencies = tensors["layers.0.1.fn.rotary_emb.inv_freq"]
    except KeyError as error:
        raise ModelError(f"MPS model {shown(model)} lacks {error.args[0]}: is it another model's file?") from error
    layers = [CrossLayer(dim, head, inner_heads // head, inner) for _ in range(count_layers(tensors, "layers."))]
    renamed = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if found and found[2] in LAYER_NAMES:
            renamed[f"layers.{found[1]}.{LAYER_NAMES[found[2]]}.{found[3]}"] = value
    cross = CrossModel(layers, frequencies)
    try:
        cross.load_state_dict(renamed)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ModelError(f"MPS model {shown(model)} does not fit: {first}") from error
    return cross.eval().requires_grad_(False)
