"""Random-weight preference models of a few hundred thousand parameters, in the files that the published ones have."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.tiny_models import save_clip

Tensors = dict[str, Tensor]

PIXELS, PATCH = 28, 14
LENGTH = 24
WORDS = ["re", "red", "bl", "blu", "blue", "ci", "cir", "st", "sta", "star", "sm", "sma", "smal", "small"]


def save_bpe(directory: Path) -> int:
    """CLIP's byte-level BPE with a few merges, its start and end words last as in the real one; returns its size."""
    letters = list(bytes_to_unicode().values())
    merges = [(word[:-1], word[-1]) for word in WORDS]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *WORDS, "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges).save_pretrained(directory)
    return len(words)


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """Tensors large enough that every part of the network shows in its output; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in shapes.items():
        norm = len(shape) == 1 and name.endswith("weight")
        width = shape[-1] if len(shape) == 2 else max(1, torch.Size(shape[1:]).numel())
        noise = torch.randn(shape, generator=generator)
        drawn[name] = 1 + 0.1 * noise if norm else noise * (0.1 if len(shape) == 1 else width**-0.5)
    return drawn


def open_clip_tensors(vocabulary: int, *, text: int = 128, vision: int = 160, embed: int = 48) -> Tensors:
    """What torch.load(HPS_v2.1_compressed.pt)["state_dict"] has, for two layers each."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (LENGTH, text),
        "text_projection": (text, embed),
        "token_embedding.weight": (vocabulary, text),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": ((PIXELS // PATCH) ** 2 + 1, vision),
        "visual.proj": (vision, embed),
        "visual.conv1.weight": (vision, 3, PATCH, PATCH),
    }
    for tower, width in (("", text), ("visual.", vision)):
        norms = ("visual.ln_pre", "visual.ln_post") if tower else ("ln_final",)
        for norm in norms:
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}"
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            linears = (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            )
            for name, out, into in linears:
                shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
    return draw(shapes, 2) | {"logit_scale": torch.tensor(4.6052)}


def save_hpsv2(directory: Path) -> Path:
    tensors = open_clip_tensors(save_bpe(directory))
    torch.save({"epoch": 3, "state_dict": tensors}, directory / "HPS_v2.1_compressed.pt")
    return directory


def mlp_tensors(into: int, prefix: str = "layers.") -> Tensors:
    """ImageReward's and the aesthetic predictor's last network: linear layers, with dropout at 1, 3 and 5."""
    widths = {0: (1024, into), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    shapes: dict[str, tuple[int, ...]] = {}
    for number, shape in widths.items():
        shapes |= {f"{prefix}{number}.weight": shape, f"{prefix}{number}.bias": shape[:1]}
    return draw(shapes, 3)


def save_aesthetic(directory: Path) -> Path:
    """The predictor beside the CLIP model that it reads."""
    torch.save(mlp_tensors(32), save_clip(directory) / "sac+logos+ava1-l14-linearMSE.pth")
    return directory


MED = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 128,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 64, "model_type": "bert", "num_attention_heads": 4,
    "num_hidden_layers": 2, "pad_token_id": 0, "add_type_embeddings": False, "vocab_size": 44, "encoder_width": 768,
    "add_cross_attention": True,
}  # fmt: skip
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "red", "blue", "large", "circle", "star",
              "##s", ",", "cross", "x"]  # fmt: skip


def save_bert(directory: Path) -> int:
    letters = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" if letter != "s"]
    vocabulary = {word: i for i, word in enumerate([*BERT_WORDS, *letters])}
    BertTokenizer(vocab=vocabulary).save_pretrained(directory)
    return len(vocabulary) + 2  # and "[DEC]", "[ENC]"


def imagereward_tensors(vocabulary: int, *, vision: int = 128) -> Tensors:
    """What torch.load(ImageReward.pt) has, for two layers each."""
    text, inner = 64, 128
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, (32 // 16) ** 2 + 1, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, 16, 16),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (64, text),
    }
    linears: dict[str, tuple[int, int]] = {"blip.vision_proj": (256, vision), "blip.text_proj": (256, text)}
    norms = {"blip.visual_encoder.norm": vision, "blip.text_encoder.embeddings.LayerNorm": text}
    shapes["blip.visual_encoder.patch_embed.proj.bias"] = (vision,)
    for i in range(2):
        block = f"blip.visual_encoder.blocks.{i}"
        norms |= {f"{block}.norm1": vision, f"{block}.norm2": vision}
        linears |= {
            f"{block}.attn.qkv": (3 * vision, vision), f"{block}.attn.proj": (vision, vision),
            f"{block}.mlp.fc1": (4 * vision, vision), f"{block}.mlp.fc2": (vision, 4 * vision),
        }  # fmt: skip
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention, into in (("attention", text), ("crossattention", vision)):
            linears |= {
                f"{layer}.{attention}.self.query": (text, text), f"{layer}.{attention}.self.key": (text, into),
                f"{layer}.{attention}.self.value": (text, into), f"{layer}.{attention}.output.dense": (text, text),
            }  # fmt: skip
            norms[f"{layer}.{attention}.output.LayerNorm"] = text
        linears |= {f"{layer}.intermediate.dense": (inner, text), f"{layer}.output.dense": (text, inner)}
        norms[f"{layer}.output.LayerNorm"] = text
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    positions = {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    return draw(shapes, 4) | positions | mlp_tensors(text, "mlp.layers.")


def save_imagereward(directory: Path) -> Path:
    vocabulary = save_bert(directory)
    (directory / "med_config.json").write_text(json.dumps(MED | {"vocab_size": vocabulary}))
    torch.save(imagereward_tensors(vocabulary), directory / "ImageReward.pt")
    return directory


class MpsParts(nn.Module):
    """The published MPS module's tree: a CLIPModel, and what reads the prompt into the picture."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.model = CLIPModel(mps_config(vocabulary))
        self.cross_model = nn.Module()
        self.cross_model.layers = nn.ModuleList(nn.ModuleList([residual(), residual()]) for _ in range(2))
        dim, head, heads, inner = 48, 8, 4, 96
        for i, (cross, self_) in enumerate(self.cross_model.layers):  # type: ignore[arg-type]
            generator = torch.Generator().manual_seed(10 + i)
            for name, shape in {
                "to_q": (heads * head, dim), "to_kv": (2 * head, dim), "to_out": (dim, heads * head),
            }.items():  # fmt: skip
                setattr(cross.fn, name, linear(shape, generator))
            cross.fn.ff = nn.Sequential(linear((2 * inner, dim), generator), nn.SiLU(), linear((dim, inner), generator))
            self_.fn.fused_attn_ff_proj = linear((heads * head + 2 * head + 2 * inner, dim), generator)
            self_.fn.attn_out = linear((dim, heads * head), generator)
            self_.fn.ff_out = nn.Sequential(nn.SiLU(), linear((dim, inner), generator))
            self_.fn.rotary_emb = nn.Module()
            self_.fn.rotary_emb.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, head, 2) / head))
            self_.fn.register_buffer("pos_emb", torch.zeros(3), persistent=False)  # a cache, never saved
            for block in (cross, self_):
                block.fn.norm = nn.Module()
                block.fn.norm.weight = nn.Parameter(1 + 0.1 * torch.randn(dim, generator=generator))
                block.fn.norm.register_buffer("bias", torch.zeros(dim))


def residual() -> nn.Module:
    block = nn.Module()
    block.fn = nn.Module()
    return block


def linear(shape: tuple[int, int], generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight = nn.Parameter(torch.randn(shape, generator=generator) * shape[1] ** -0.5)
    return layer


def mps_config(vocabulary: int) -> CLIPConfig:
    shared = {"projection_dim": 48, "hidden_act": "gelu", "num_hidden_layers": 2, "initializer_factor": 8.0}
    text = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1,
            "max_position_embeddings": LENGTH, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1}  # fmt: skip
    vision = {"hidden_size": 160, "intermediate_size": 320, "num_attention_heads": 2, "image_size": PIXELS,
              "patch_size": PATCH}  # fmt: skip
    return CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=48)


def save_processor(directory: Path) -> None:
    square = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=square).save_pretrained(directory)


def save_mps(directory: Path) -> Path:
    tensors = MpsParts(save_bpe(directory)).state_dict()
    save_processor(directory)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "MPS_overall_checkpoint.safetensors")
    return directory


def pictures() -> Iterator[tuple[int, int]]:
    """Heights and widths that resize up, down, and not at all, square or not."""
    yield from ((28, 28), (64, 64), (45, 30), (20, 51))
