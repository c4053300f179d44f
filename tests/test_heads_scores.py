"""Each head against a straight re-implementation of its network, from the very files that it opens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from epd_ray.errors import RewardError
from epd_ray.rewards import HEADS, mps
from epd_ray.rewards.preprocess import pil_pixels, tensor_pixels
from tests.tiny_heads import (
    LENGTH,
    MED,
    PIXELS,
    Tensors,
    mps_config,
    save_aesthetic,
    save_hpsv2,
    save_imagereward,
    save_mps,
)
from tests.tiny_models import save_clip

PROMPTS = ["a small red circle", "a large blue star, x", "“cross” &amp; star"]
PLAIN = [*PROMPTS[:2], "a cross"]  # for the heads that do not clean
SAVE: dict[str, Callable[[Path], Path]] = {
    "aesthetic": save_aesthetic,
    "hpsv2.1": save_hpsv2,
    "imagereward": save_imagereward,
    "mps": save_mps,
    "pickscore": save_clip,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = SAVE[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


def pictures(height: int = 40, width: int = 40, count: int = 3) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height))


def make(name: str, folder: Path, **options: Any) -> Any:
    return HEADS.get(name)(model=str(folder), device="cpu", **options)


def assert_near(scores: Tensor, expected: Tensor, tolerance: float) -> None:
    assert scores.shape == expected.shape and scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert expected.std() > 100 * tolerance  # so a mixed-up order would show
    assert (scores - expected).abs().max() < tolerance


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def norm(t: Tensors, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def open_clip_tower(t: Tensors, tower: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    for i in range(2):
        block = f"{tower}transformer.resblocks.{i}"
        y = norm(t, f"{block}.ln_1", x).transpose(0, 1)
        attention = F.multi_head_attention_forward(
            y, y, y, y.shape[-1], heads, t[f"{block}.attn.in_proj_weight"], t[f"{block}.attn.in_proj_bias"], None, None,
            False, 0.0, t[f"{block}.attn.out_proj.weight"], t[f"{block}.attn.out_proj.bias"], attn_mask=mask,
        )[0]  # fmt: skip
        x = x + attention.transpose(0, 1)
        x = x + linear(t, f"{block}.mlp.c_proj", F.gelu(linear(t, f"{block}.mlp.c_fc", norm(t, f"{block}.ln_2", x))))
    return x


@pytest.mark.parametrize("size", [(40, 40), (28, 28), (50, 33)])
def test_hpsv2(folder: Callable[[str], Path], size: tuple[int, int]) -> None:
    directory, images = folder("hpsv2.1"), pictures(*size)
    t = torch.load(directory / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    pixels = tensor_pixels(images, PIXELS)
    patches = F.conv2d(pixels, t["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    first = t["visual.class_embedding"].expand(3, 1, -1)
    x = norm(t, "visual.ln_pre", torch.cat([first, patches], 1) + t["visual.positional_embedding"])
    x = open_clip_tower(t, "visual.", x, 2, None)
    image = norm(t, "visual.ln_post", x[:, 0]) @ t["visual.proj"]
    tokenizer = CLIPTokenizer.from_pretrained(directory)
    ids = torch.zeros(3, LENGTH, dtype=torch.long)
    for row, prompt in zip(ids, [*PROMPTS[:2], '"cross" & star'], strict=True):  # cleaned by hand
        numbers = tokenizer(prompt).input_ids[:LENGTH]
        row[: len(numbers)] = torch.tensor(numbers)
        row[LENGTH - 1] = row[LENGTH - 1] and tokenizer.eos_token_id
    x = t["token_embedding.weight"][ids] + t["positional_embedding"]
    x = open_clip_tower(t, "", x, 2, torch.full((LENGTH, LENGTH), -torch.inf).triu(1))
    text = norm(t, "ln_final", x)[torch.arange(3), ids.argmax(1)] @ t["text_projection"]
    expected = (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)
    assert_near(make("hpsv2.1", directory).score(images, PROMPTS), expected, 1e-5)


def test_pickscore(folder: Callable[[str], Path]) -> None:
    directory, images = folder("pickscore"), pictures()
    network, tokenizer = CLIPModel.from_pretrained(directory).eval(), CLIPTokenizer.from_pretrained(directory)
    files = [Image.fromarray(np.round(255 * i.permute(1, 2, 0).numpy()).astype(np.uint8)) for i in images]
    pixels = CLIPImageProcessorPil.from_pretrained(directory)(files, return_tensors="pt").pixel_values
    rows = []
    for pixel, prompt in zip(pixels, PLAIN, strict=True):
        with torch.inference_mode():
            out = network(pixel_values=pixel[None], input_ids=tokenizer(prompt, return_tensors="pt").input_ids)
        rows.append(out.logits_per_image[0, 0])
    assert_near(make("pickscore", directory).score(images, PLAIN), torch.stack(rows), 1e-5)
    curly, straight = (make("pickscore", directory).score(images[:1], [p]) for p in ("“star”", '"star"'))
    assert curly != straight  # prompts are taken as they are


def mlp(t: Tensors, prefix: str, x: Tensor) -> Tensor:
    for number in (0, 2, 4, 6, 7):
        x = linear(t, f"{prefix}{number}", x)
    return x[:, 0]


def test_aesthetic(folder: Callable[[str], Path]) -> None:
    directory, images = folder("aesthetic"), pictures()
    t = torch.load(directory / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    network = CLIPModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        embeds = network.get_image_features(pixel_values=pil_pixels(images, 32)).pooler_output
    expected = mlp(t, "layers.", embeds / embeds.norm(dim=-1, keepdim=True))
    head = make("aesthetic", directory)
    assert_near(head.score(images, PROMPTS), expected, 1e-6)
    assert torch.equal(head.score(images, PROMPTS), head.score(images, ["other"] * 3))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def test_imagereward(folder: Callable[[str], Path]) -> None:
    directory, images = folder("imagereward"), pictures(50, 41)
    t = torch.load(directory / "ImageReward.pt", weights_only=True)
    v = {k.removeprefix("blip.visual_encoder."): x for k, x in t.items()}
    patches = F.conv2d(
        pil_pixels(images, 32), v["patch_embed.proj.weight"], v["patch_embed.proj.bias"], stride=16
    ).flatten(2).transpose(1, 2)  # fmt: skip
    x = torch.cat([v["cls_token"].expand(3, -1, -1), patches], 1) + v["pos_embed"]
    for i in range(2):
        query, key, value = linear(v, f"blocks.{i}.attn.qkv", norm(v, f"blocks.{i}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(v, f"blocks.{i}.attn.proj", attend(query, key, value, 2))
        inner = F.gelu(linear(v, f"blocks.{i}.mlp.fc1", norm(v, f"blocks.{i}.norm2", x, 1e-6)))
        x = x + linear(v, f"blocks.{i}.mlp.fc2", inner)
    seen = norm(v, "norm", x, 1e-6)
    b = {k.removeprefix("blip.text_encoder."): x for k, x in t.items()}
    words = BertTokenizer.from_pretrained(directory)(PROMPTS, padding="max_length", max_length=35, truncation=True)
    ids, kept = torch.tensor(words.input_ids), torch.tensor(words.attention_mask)
    mask = torch.where(kept == 1, 0.0, -torch.inf)[:, None, None]
    x = b["embeddings.word_embeddings.weight"][ids] + b["embeddings.position_embeddings.weight"][:35]
    x = norm(b, "embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        for name, other, hidden in (("attention", None, mask), ("crossattention", seen, 0.0)):
            at = f"encoder.layer.{i}.{name}"
            parts = [
                linear(b, f"{at}.self.{n}", s) for n, s in zip(
                    ("query", "key", "value"), (x, x, x) if other is None else (x, other, other), strict=True
                )
            ]  # fmt: skip
            out = linear(b, f"{at}.output.dense", attend(*parts, int(str(MED["num_attention_heads"])), hidden))
            x = norm(b, f"{at}.output.LayerNorm", x + out, 1e-12)
        layer = f"encoder.layer.{i}"
        out = linear(b, f"{layer}.output.dense", F.gelu(linear(b, f"{layer}.intermediate.dense", x)))
        x = norm(b, f"{layer}.output.LayerNorm", x + out, 1e-12)
    expected = (mlp(t, "mlp.layers.", x[:, 0]) - 0.16717362830052426) / 1.0333394966054072
    assert_near(make("imagereward", directory).score(images, PROMPTS), expected, 1e-5)


def published_mps(t: Tensors, network: Any, pixels: Tensor, ids: Tensor, condition: Tensor, share: float) -> Tensor:
    """One picture and one prompt, in the order of the published code: einsums, an additive mask, one sample."""
    text = network.text_model(input_ids=ids)
    words, sentence = (network.text_projection(x) for x in (text.last_hidden_state, text.pooler_output))
    about = network.text_projection(network.text_model(input_ids=condition).last_hidden_state)
    x = network.visual_projection(network.vision_model(pixel_values=pixels).last_hidden_state)
    likeness = torch.einsum("bid,bjd->bji", words, about).max(1, keepdim=True)[0]
    mask = torch.where(likeness / likeness.max() > share, 0.0, -torch.inf)
    for i in range(2):
        cross, own = f"cross_model.layers.{i}.0.fn", f"cross_model.layers.{i}.1.fn"
        y = norm(t, f"{cross}.norm", x)
        query = linear(t, f"{cross}.to_q", y).unflatten(-1, (4, 8)) * 8**-0.5
        key, value = linear(t, f"{cross}.to_kv", words).chunk(2, -1)
        weights = (torch.einsum("bihd,bjd->bhij", query, key) + mask[:, None]).softmax(-1)
        out = linear(t, f"{cross}.to_out", torch.einsum("bhij,bjd->bihd", weights, value).flatten(2))
        up, switch = linear(t, f"{cross}.ff.0", y).chunk(2, -1)
        x = out + linear(t, f"{cross}.ff.2", F.silu(switch) * up) + x
        y = norm(t, f"{own}.norm", x)
        query, key, value, up, switch = linear(t, f"{own}.fused_attn_ff_proj", y).split([32, 8, 8, 96, 96], -1)
        angles = torch.arange(x.shape[1])[:, None] * t[f"{own}.rotary_emb.inv_freq"].repeat(2)
        query = turn(query.unflatten(-1, (4, 8)).transpose(1, 2), angles) * 8**-0.5
        weights = torch.einsum("bhid,bjd->bhij", query, turn(key, angles)).softmax(-1)
        out = torch.einsum("bhij,bjd->bihd", weights, value).flatten(2)
        x = linear(t, f"{own}.attn_out", out) + linear(t, f"{own}.ff_out.1", F.silu(switch) * up) + x
    return network.logit_scale.exp() * torch.cosine_similarity(sentence, x[:, 0])


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (x[i], x[i + half]) as a complex number, times exp(i * angle)."""
    half = x.shape[-1] // 2
    number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angles[:, :half])
    return torch.cat((number.real, number.imag), -1)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_mps(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    assert mps.THRESHOLD == 0.3
    monkeypatch.setattr(mps, "THRESHOLD", share)
    directory, images = folder("mps"), pictures()
    t, tokenizer = load_file(directory / "MPS_overall_checkpoint.safetensors"), CLIPTokenizer.from_pretrained(directory)
    network = CLIPModel(mps_config(len(tokenizer))).eval()
    network.load_state_dict({k.removeprefix("model."): x for k, x in t.items() if k.startswith("model.")})
    pixels = CLIPImageProcessorPil.from_pretrained(directory)(
        list((images * 255).round().byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt"
    ).pixel_values
    ids, condition = (
        tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        for texts in (PLAIN, ["light, things"])
    )
    with torch.inference_mode():
        expected = torch.cat(
            [published_mps(t, network, p[None], i[None], condition, share) for p, i in zip(pixels, ids, strict=True)]
        )
    assert_near(make("mps", directory, condition="light, things").score(images, PLAIN), expected, 1e-5)


def test_mps_looks_at_fewer_words_above_the_threshold() -> None:
    words = torch.tensor([[[1.0, 0.0], [0.2, 0.0], [0.4, 0.0]], [[2.0, 0.0], [0.5, 0.0], [2.0, 0.0]]])
    seen = mps.relevant(words, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert seen.tolist() == [[True, False, True], [True, False, True]]  # a share of the prompt's own largest


@pytest.mark.parametrize("name", SAVE)
def test_pictures_go_through_in_batches(folder: Callable[[str], Path], name: str) -> None:
    images, prompts = pictures(count=7), [*PROMPTS, *PLAIN, "star"]
    whole = make(name, folder(name), batch_size=7)
    assert torch.allclose(make(name, folder(name), batch_size=3).score(images, prompts), whole.score(images, prompts),
                          atol=1e-5)  # fmt: skip
    assert whole.score(images[:0], []).shape == (0,)


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize("shape", [(1, 17), (30_000, 1)])
def test_pictures_that_are_too_long_are_refused(
    folder: Callable[[str], Path], name: str, shape: tuple[int, int]
) -> None:
    head = make(name, folder(name))
    with pytest.raises(RewardError, match=f"{shape[0]} x {shape[1]} .* 16 times"):
        head.score(torch.zeros(1, 3, *shape), PROMPTS[:1])
    longest = torch.rand(1, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    assert head.score(longest, PROMPTS[:1]).isfinite().all()


@pytest.mark.parametrize("name", SAVE)
def test_half_precision_network_gives_float32_scores(folder: Callable[[str], Path], name: str) -> None:
    images = pictures()
    exact = make(name, folder(name)).score(images, PLAIN)
    half = make(name, folder(name), dtype="float16").score(images, PLAIN)
    assert half.dtype == torch.float32 and half.isfinite().all() and not torch.equal(half, exact)
    assert (half - exact).abs().max() < 0.05 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("name", SAVE)
def test_what_made_a_score_is_named(folder: Callable[[str], Path], name: str) -> None:
    head = make(name, folder(name), revision="v1")
    assert head.model_id == str(folder(name)) and head.revision == "v1"
