"""Vision-language models of a hundred thousand random weights, in the files that the published ones have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from epd_ray.rewards import hpsv3, unifiedreward
from tests.tiny_heads import draw

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
GOT_SPECIAL = [*SPECIAL[:3], "<img>", "<imgpad>", "</img>"]
WORDS = ["Yes", "yes", "Two", "two"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["1.0", "1.3", "1.75", "2", "2.2", "2.71", "3.25", "3.5", "4", "4.4", "4.9", "5"]
ACS = [
    [f"{'' if i == 0 else chr(10)}{name} Score (1-5): {mark}" for mark in MARKS]
    for i, name in enumerate(("Alignment", "Coherence", "Style"))
]
"""What a tiny UnifiedReward may write, in order: one piece of each list."""

PIECES = [["Op", "OP", "xx"], ["en ", "ten", "q"], ["Daily", "air", ""]]
"""What a tiny GOT-OCR may write."""

WIDTH, PATCH, SIDE = 64, 14, 56  # of the language model, of the vision model, and of a picture
PIXELS = SIDE * SIDE
GAINS = {"lm_head": 0.5, "q_proj": 3.0, "k_proj": 3.0, "rm_head": 2.0, "patch_embed": 2.0}
"""Weights that are larger: each word then attends to few others, so that pictures and prompts show in the output."""
STEPS = 6  # dimensions of the language model that count the pieces it has written


def save_tokenizer(directory: Path, special: Sequence[str], pieces: Sequence[Sequence[str]] = ()) -> Any:
    """A byte-level BPE that knows WORDS with and without a space before them, and whole pieces as tokens."""
    letters = list(bytes_to_unicode().values())
    merges = [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
    merges += [("Ġ", word) for word in WORDS]
    words = dict.fromkeys([*letters, *(first + second for first, second in merges)])
    spec = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(dict.fromkeys(merges))))
    spec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spec, eos_token=special[2], pad_token=special[0], additional_special_tokens=list(special)
    )
    tokenizer.add_tokens([piece for part in pieces for piece in part if piece])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def randomise(network: nn.Module, seed: int) -> None:
    """Weights large enough that every part of the network shows in its output; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
            else:
                gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
                weight.copy_(gain * noise * (1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5))


def speak(network: Any, tokenizer: Any, pieces: Sequence[Sequence[str]]) -> None:
    """Let a network write one piece of each list and stop; which one, its random weights decide from what they see.

    The last STEPS dimensions count the pieces: no layer writes into them, so that a token's own number goes through.
    """
    language, counter = network.model.language_model, range(WIDTH - STEPS, WIDTH)
    with torch.no_grad():
        for layer in language.layers:
            layer.self_attn.o_proj.weight[counter] = 0
            layer.mlp.down_proj.weight[counter] = 0
        language.norm.weight[counter] = 1
        language.embed_tokens.weight[:, counter] = 0
        language.embed_tokens.weight[:, counter[0]] = 10
        network.lm_head.weight[:, counter] = 0
        for step, part in enumerate([*pieces, [tokenizer.eos_token]]):
            for piece in part:
                token = tokenizer.convert_tokens_to_ids(piece or tokenizer.eos_token)
                network.lm_head.weight[token, counter[step]] = 30
                language.embed_tokens.weight[token, counter[0]] = 0
                language.embed_tokens.weight[token, counter[step + 1]] = 10


def text_sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip


def qwen_ids(tokenizer: Any) -> dict[str, Any]:
    names = {"vision_start_token_id": SPECIAL[3], "image_token_id": SPECIAL[4], "vision_end_token_id": SPECIAL[5]}
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    return ids | {"video_token_id": len(tokenizer) + 1, "tie_word_embeddings": False}


def qwen2(tokenizer: Any) -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    config = Qwen2VLConfig(text_config=text_sizes(tokenizer), vision_config=vision, **qwen_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config)


def qwen25(tokenizer: Any) -> Any:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": WIDTH, "num_heads": 2, "intermediate_size": 64,
              "patch_size": PATCH, "window_size": 2 * PATCH, "fullatt_block_indexes": [1]}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text_sizes(tokenizer), vision_config=vision, **qwen_ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3(tokenizer: Any) -> Any:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": WIDTH, "num_heads": 2, "intermediate_size": 64,
              "patch_size": PATCH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    sizes = text_sizes(tokenizer) | {"head_dim": 16}
    config = Qwen3VLConfig(text_config=sizes, vision_config=vision, **qwen_ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config)


def long_lines(question: str) -> list[str]:
    """Lines of a question that are tokens of a tiny model, so that a long question has few."""
    return [line for line in question.splitlines() if len(line) > 9 and not {"{", "<"} & set(line)]


def save_chat(directory: Path, make: Any, pieces: Sequence[Sequence[str]] = (), question: str = "") -> Path:
    tokenizer = save_tokenizer(directory, SPECIAL, [*pieces, long_lines(question)])
    with torch.random.fork_rng():
        network = make(tokenizer).eval()
    randomise(network, 7)
    if pieces:
        speak(network, tokenizer, pieces)
    else:  # make what is asked for neither certain nor impossible
        with torch.no_grad():
            network.lm_head.weight[tokenizer.convert_tokens_to_ids([*WORDS, *(f"Ġ{word}" for word in WORDS)])] *= -3
    network.save_pretrained(directory)
    size = {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": PIXELS}
    Qwen2VLImageProcessorPil(size=size, patch_size=PATCH).save_pretrained(directory)
    return directory


def save_vqascore(directory: Path) -> Path:
    return save_chat(directory, qwen25)


def save_geneval2(directory: Path) -> Path:
    return save_chat(directory, qwen3)


def save_unifiedreward(directory: Path) -> Path:
    return save_chat(directory, qwen25, ACS, unifiedreward.QUESTION)


def save_hpsv3(directory: Path) -> Path:
    """HPSv3.safetensors, with the names that Qwen2-VL had when it was trained, beside Qwen2-VL's own files."""
    tokenizer = save_tokenizer(directory, SPECIAL, [long_lines(hpsv3.QUESTION)])
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    Qwen2VLImageProcessorPil(size=size, patch_size=PATCH).save_pretrained(directory)
    with torch.random.fork_rng():
        base = qwen2(tokenizer)
        base.config.text_config.vocab_size += 40  # unused ones, as Qwen2-VL has
        base.config.save_pretrained(directory)
        tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
        network = qwen2(tokenizer)
        network.rm_head = nn.Sequential(
            nn.Linear(WIDTH, 32), nn.ReLU(), nn.Dropout(0.05), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)
        )
    randomise(network, 8)
    save_file({old_name(name): tensor.clone() for name, tensor in network.state_dict().items()},
              directory / "HPSv3.safetensors")  # fmt: skip
    return directory


def old_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def save_got(directory: Path) -> Path:
    tokenizer = save_tokenizer(directory, GOT_SPECIAL, PIECES)
    text = text_sizes(tokenizer) | {"model_type": "qwen2"}
    del text["rope_parameters"]["mrope_section"]
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 128, "patch_size": 16,
              "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48, "output_channels": 16}  # fmt: skip
    with torch.random.fork_rng():
        network = GotOcr2ForConditionalGeneration(GotOcr2Config(
            text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
            image_seq_length=4, tie_word_embeddings=False,
        )).eval()  # fmt: skip
    randomise(network, 9)
    speak(network, tokenizer, PIECES)
    network.save_pretrained(directory)
    GotOcr2ImageProcessorPil(size={"height": 128, "width": 128}).save_pretrained(directory)
    return directory


OWL = {
    "model_type": "mplug_owl2", "vocab_size": 0, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
    "visual_config": {
        "visual_model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-6, "hidden_act": "quick_gelu"},
        "visual_abstractor": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
                              "num_attention_heads": 2, "num_learnable_queries": 4, "layer_norm_eps": 1e-6,
                              "encoder_hidden_size": 32, "grid_size": SIDE // PATCH, "use_cls_token": True},
    },
}  # fmt: skip
RATINGS = ["excellent", "good", "fair", "poor", "bad"]


def owl_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of DeQA-Score's checkpoint, for two layers of each part."""
    patches, seen, inner, queries = (SIDE // PATCH) ** 2 + 1, 32, 48, 4
    vision, abstractor = "model.vision_model", "model.visual_abstractor"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, WIDTH), "lm_head.weight": (vocabulary, WIDTH),
        "model.norm.weight": (WIDTH,),
        f"{vision}.embeddings.cls_token": (1, 1, seen), f"{vision}.embeddings.position_embedding": (1, patches, seen),
        f"{vision}.embeddings.patch_embed.weight": (seen, 3, PATCH, PATCH),
        f"{abstractor}.query_embeds": (1, queries, seen), f"{abstractor}.vit_eos": (1, 1, WIDTH),
    }  # fmt: skip
    linears: dict[str, tuple[int, int]] = {f"{abstractor}.visual_fc": (WIDTH, seen)}
    norms = {f"{vision}.embeddings.pre_layernorm": seen, f"{vision}.post_layernorm": seen}
    for i in range(2):
        block, cross = f"{vision}.encoder.layers.{i}", f"{abstractor}.encoder.layers.{i}.crossattention"
        linears |= {
            f"{block}.self_attn.query_key_value": (3 * seen, seen), f"{block}.self_attn.dense": (seen, seen),
            f"{block}.mlp.fc1": (inner, seen), f"{block}.mlp.fc2": (seen, inner),
            f"{cross}.attention.query": (seen, seen), f"{cross}.attention.key": (seen, seen),
            f"{cross}.attention.value": (seen, seen), f"{cross}.output.out_proj": (seen, seen),
            f"{cross}.output.mlp.w1": (40, seen), f"{cross}.output.mlp.w2": (seen, 40),
            f"{cross}.output.mlp.w3": (40, seen),
        }  # fmt: skip
        norms |= {f"{block}.input_layernorm": seen, f"{block}.post_attention_layernorm": seen}
        norms |= {f"{cross}.norm1": seen, f"{cross}.normk": seen, f"{cross}.output.norm2": seen}
        norms[f"{cross}.output.mlp.ffn_ln"] = 40
        shapes |= {f"{cross}.attention.q_pos_embed": (queries, seen), f"{cross}.attention.k_pos_embed": (patches, seen)}
        layer = f"model.layers.{i}"
        plain = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (96, WIDTH),
                 "mlp.up_proj": (96, WIDTH), "mlp.down_proj": (WIDTH, 96)}  # fmt: skip
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in plain.items()}
        for way in range(2):
            for name in ("k_proj", "v_proj"):
                shapes[f"{layer}.self_attn.{name}.multiway.{way}.weight"] = (WIDTH // 2, WIDTH)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{name}.multiway.{way}.weight"] = (WIDTH,)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def save_deqa(directory: Path) -> Path:
    """DeQA-Score in two shards, with a Llama-like tokenizer that begins every text with its own token."""
    letters = list(dict.fromkeys("abcdefghijklmnopqrstuvwxyzUSERAINTHowQ?:\n▁"))
    words = ["<unk>", "<s>", "</s>", *letters, *(f"▁{word}" for word in RATINGS)]
    spec = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split = "|".join([*(f"▁{word}" for word in RATINGS), "."])
    spec.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spec.pre_tokenizer = pre_tokenizers.Split(Regex(f"{split}|\n"), "isolated")
    spec.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spec, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(directory)
    tensors = draw(owl_shapes(len(words)), 11)
    tensors["lm_head.weight"] *= 3  # so that the ratings differ
    for name in tensors:
        if "q_proj" in name or "k_proj" in name or ".attention.query.w" in name:
            tensors[name] *= 3
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # of older versions; not read
    shards = {"model-00001-of-00002.safetensors": True, "model-00002-of-00002.safetensors": False}
    index = {}
    for shard, vision in shards.items():
        held = {name: tensor for name, tensor in tensors.items() if ("visual" in name or "vision" in name) == vision}
        save_file(held, directory / shard)
        index |= dict.fromkeys(held, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(OWL | {"vocab_size": len(words)}))
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(directory)
    return directory


def save_clip_t5(directory: Path) -> Path:
    """CLIP-FlanT5 as one .bin file, with its CLIP in a folder that its config.json names."""
    letters = [*dict.fromkeys("abcdefghijklmnopqrstuvwxyzACDEINRSTUYP.:,'?\"{}()1234567890\n▁"), "▁Yes", "▁yes"]
    words = ["<pad>", "</s>", "<unk>", *letters]
    spec = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    spec.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spec.pre_tokenizer = pre_tokenizers.Split(Regex("▁[Yy]es|.|\n"), "isolated")
    spec.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=spec, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory)
    tower = directory / "tower"
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                              image_size=SIDE, patch_size=PATCH)  # fmt: skip
    config = T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)  # fmt: skip
    with torch.random.fork_rng():
        encoder, network = CLIPVisionModel(vision), T5ForConditionalGeneration(config)
        network.mm_projector = nn.Sequential(nn.Linear(32, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    randomise(encoder, 12)
    randomise(network, 13)
    with torch.no_grad():
        network.lm_head.weight.mul_(4)  # so that answers differ
    encoder.save_pretrained(tower)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(tower)
    torch.save(network.state_dict(), directory / "pytorch_model.bin")
    (directory / "config.json").write_text(
        json.dumps(config.to_dict() | {"model_type": "clip_t5", "mm_vision_tower": str(tower)})
    )
    return directory


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pictures(count: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Pictures of four noisy coloured patches each."""
    generator = torch.Generator().manual_seed(height + width)
    coarse = torch.rand(count, 3, 2, 2, generator=generator)
    fine = torch.rand(count, 3, height, width, generator=generator)
    return 0.8 * nn.functional.interpolate(coarse, (height, width)) + 0.2 * fine
