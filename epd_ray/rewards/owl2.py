"""mPLUG-Owl2 (Ye et al. 2023), which transformers does not have: a Llama with weights of its own for picture tokens.

The modules have the names of the published checkpoints. Source: X-PLUG/mPLUG-Owl, and zhiyuanyou/DeQA-Score.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from epd_ray.rewards.mps import rotate

NORM_EPS = 1e-5  # of the abstractor's own layer norms, whose number is in no configuration


class VisionSizes(BaseModel):
    """How the image encoder, a ViT, is built."""

    model_config = ConfigDict(strict=True)

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    image_size: PositiveInt
    patch_size: PositiveInt
    layer_norm_eps: PositiveFloat


class AbstractorSizes(BaseModel):
    """How the abstractor is built, which sums the patches up in a fixed number of tokens."""

    model_config = ConfigDict(strict=True)

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_learnable_queries: PositiveInt
    layer_norm_eps: PositiveFloat


class VisualSizes(BaseModel):
    """Both parts that see."""

    visual_model: VisionSizes
    visual_abstractor: AbstractorSizes


class OwlSizes(BaseModel):
    """The fields of config.json that say how an mPLUG-Owl2 is built."""

    model_config = ConfigDict(strict=True)

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat = 10000.0
    visual_config: VisualSizes


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """Attention [B, T, D] of queries [B, heads, T, head] to keys and values, of which there may be fewer heads."""
    out = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=key.shape[1] != query.shape[1])
    return out.transpose(1, 2).flatten(2)


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] as [B, heads, T, D / heads]."""
    split: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split


class VisionEmbeddings(nn.Module):
    """Pixels [B, 3, S, S] to embeddings [B, 1 + P, D] of the whole picture and of its patches."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        width, patches = sizes.hidden_size, (sizes.image_size // sizes.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, patches + 1, width))
        self.patch_embed = nn.Conv2d(3, width, sizes.patch_size, sizes.patch_size, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, sizes.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # [B, P, D]
        whole = self.cls_token.expand(len(pixels), -1, -1)
        embedded: Tensor = self.pre_layernorm(torch.cat((whole, patches), dim=1) + self.position_embedding)
        return embedded


class VisionLayer(nn.Module):
    """A layer of the image encoder; query, key and value of each head lie beside each other in one matrix."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        width, inner = sizes.hidden_size, sizes.intermediate_size
        self.heads = sizes.num_attention_heads
        self.input_layernorm = nn.LayerNorm(width, sizes.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(width, sizes.layer_norm_eps)
        self.self_attn = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.self_attn["query_key_value"](self.input_layernorm(x))  # [B, T, heads * 3 * head]
        query, key, value = mixed.unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        x = x + self.self_attn["dense"](attend(query, key, value))
        inner = self.mlp["fc1"](self.post_attention_layernorm(x))
        added: Tensor = x + self.mlp["fc2"](inner * torch.sigmoid(1.702 * inner))
        return added


class VisionModel(nn.Module):
    """The image encoder."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(sizes)
        layers = nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.num_hidden_layers))
        self.encoder: Any = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(sizes.hidden_size, sizes.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.encoder["layers"]:
            x = layer(x)
        seen: Tensor = self.post_layernorm(x)
        return seen


class GatedMlp(nn.Module):
    """The abstractor's feed-forward layer."""

    def __init__(self, sizes: AbstractorSizes) -> None:
        super().__init__()
        width, inner = sizes.hidden_size, sizes.intermediate_size
        self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, sizes.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(self.ffn_ln(silu(self.w1(x)) * self.w3(x)))
        return out


class CrossAttention(nn.Module):
    """Attention of Q queries to themselves and to P patches, whose positions are added to what is compared."""

    def __init__(self, sizes: AbstractorSizes, patches: int) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.heads = sizes.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.q_pos_embed = nn.Parameter(torch.empty(sizes.num_learnable_queries, width))
        self.k_pos_embed = nn.Parameter(torch.empty(patches, width))

    def forward(self, queries: Tensor, everything: Tensor) -> Tensor:
        positions = torch.cat((self.q_pos_embed, self.k_pos_embed))
        query = self.query(queries + self.q_pos_embed)
        key, value = self.key(everything + positions), self.value(everything)
        return attend(*(by_head(x, self.heads) for x in (query, key, value)))


class AbstractorLayer(nn.Module):
    """A layer of the abstractor; the residual of its attention is the normalised input, as published."""

    def __init__(self, sizes: AbstractorSizes, patches: int) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.crossattention: Any = nn.ModuleDict({
            "attention": CrossAttention(sizes, patches),
            "norm1": nn.LayerNorm(width, NORM_EPS),
            "normk": nn.LayerNorm(width, NORM_EPS),
            "output": nn.ModuleDict({
                "out_proj": nn.Linear(width, width), "norm2": nn.LayerNorm(width, NORM_EPS), "mlp": GatedMlp(sizes),
            }),
        })  # fmt: skip

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        part, out = self.crossattention, self.crossattention["output"]
        queries = part["norm1"](queries)
        everything = torch.cat((queries, part["normk"](patches)), dim=1)
        queries = queries + out["out_proj"](part["attention"](queries, everything))
        added: Tensor = queries + out["mlp"](out["norm2"](queries))
        return added


class Abstractor(nn.Module):
    """Patches [B, 1 + P, D] to Q + 1 tokens of the language model."""

    def __init__(self, sizes: AbstractorSizes, patches: int, language: int) -> None:
        super().__init__()
        layers = nn.ModuleList(AbstractorLayer(sizes, patches) for _ in range(sizes.num_hidden_layers))
        self.encoder: Any = nn.ModuleDict({"layers": layers})
        self.query_embeds = nn.Parameter(torch.empty(1, sizes.num_learnable_queries, sizes.hidden_size))
        self.visual_fc = nn.Linear(sizes.hidden_size, language)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, language))

    def forward(self, patches: Tensor) -> Tensor:
        x = self.query_embeds.expand(len(patches), -1, -1)
        for layer in self.encoder["layers"]:
            x = layer(x, patches)
        return torch.cat((self.visual_fc(x), self.vit_eos.expand(len(patches), -1, -1)), dim=1)


class Multiway(nn.Module):
    """Two modules of one kind: the first for words, the second for the tokens of the picture."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor, seen: slice) -> Tensor:
        words, picture = self.multiway
        return torch.cat((words(x[:, : seen.start]), picture(x[:, seen]), words(x[:, seen.stop :])), dim=1)


class DecoderLayer(nn.Module):
    """A layer of Llama, in which norms, keys and values are Multiway."""

    def __init__(self, sizes: OwlSizes) -> None:
        super().__init__()
        width, inner, self.heads, self.shared = (
            sizes.hidden_size, sizes.intermediate_size, sizes.num_attention_heads, sizes.num_key_value_heads
        )  # fmt: skip
        narrow = width // self.heads * self.shared
        self.input_layernorm, self.post_attention_layernorm = (
            Multiway(lambda: nn.RMSNorm(width, sizes.rms_norm_eps)) for _ in range(2)
        )
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(width, width, bias=False),
            "k_proj": Multiway(lambda: nn.Linear(width, narrow, bias=False)),
            "v_proj": Multiway(lambda: nn.Linear(width, narrow, bias=False)),
            "o_proj": nn.Linear(width, width, bias=False),
        })  # fmt: skip
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(width, inner, bias=False), "up_proj": nn.Linear(width, inner, bias=False),
            "down_proj": nn.Linear(inner, width, bias=False),
        })  # fmt: skip

    def forward(self, x: Tensor, seen: slice, angles: Tensor) -> Tensor:
        y, part = self.input_layernorm(x, seen), self.self_attn
        query = rotate(by_head(part["q_proj"](y), self.heads), angles)
        key = rotate(by_head(part["k_proj"](y, seen), self.shared), angles)
        value = by_head(part["v_proj"](y, seen), self.shared)
        x = x + part["o_proj"](attend(query, key, value, causal=True))
        y = self.post_attention_layernorm(x, seen)
        added: Tensor = x + self.mlp["down_proj"](silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))
        return added


class Owl2(nn.Module):
    """The whole model, for one picture in a text."""

    def __init__(self, sizes: OwlSizes) -> None:
        super().__init__()
        vision, abstractor = sizes.visual_config.visual_model, sizes.visual_config.visual_abstractor
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        self.model: Any = nn.ModuleDict({
            "embed_tokens": nn.Embedding(sizes.vocab_size, sizes.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.num_hidden_layers)),
            "norm": nn.RMSNorm(sizes.hidden_size, sizes.rms_norm_eps),
            "vision_model": VisionModel(vision),
            "visual_abstractor": Abstractor(abstractor, patches, sizes.hidden_size),
        })  # fmt: skip
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
        self.head, self.theta = sizes.hidden_size // sizes.num_attention_heads, sizes.rope_theta

    def forward(self, pixels: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """The logits [B, V] of the token after a text with a picture in it.

        Args:
            pixels: [B, 3, S, S].
            before: [T], ids of the tokens before the picture.
            after: [U], ids of those after it.
        """
        picture = self.model["visual_abstractor"](self.model["vision_model"](pixels))
        words = [self.model["embed_tokens"](ids).expand(len(pixels), -1, -1) for ids in (before, after)]
        x = torch.cat((words[0], picture, words[1]), dim=1)
        seen = slice(len(before), len(before) + picture.shape[1])
        exponents = torch.arange(0, self.head, 2, device=x.device).float() / self.head
        angles = torch.outer(torch.arange(x.shape[1], device=x.device).float(), self.theta**-exponents).repeat(1, 2)
        for layer in self.model["layers"]:
            x = layer(x, seen, angles)
        logits: Tensor = self.lm_head(self.model["norm"](x[:, -1]))
        return logits
