import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from epd_ray.errors import ModelError
from epd_ray.rewards.clip import ClipHead
from tests.tiny_models import save_clip

PROMPTS = ["a small red circle in the center", "a large blue star", "a cross"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def pictures(height: int, width: int) -> Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))


def direct(folder: Path, images: Tensor) -> tuple[Tensor, float]:
    """Cosine by the model's own forward pass, from saved-file pixels and unpadded text, and exp(logit_scale)."""
    network = CLIPModel.from_pretrained(folder).eval()
    files = [Image.fromarray(np.round(255 * i.permute(1, 2, 0).numpy()).astype(np.uint8)) for i in images]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(files, return_tensors="pt").pixel_values
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    rows = []
    for pixel, prompt in zip(pixels, PROMPTS, strict=True):
        with torch.inference_mode():
            out = network(pixel_values=pixel[None], input_ids=tokenizer(prompt, return_tensors="pt").input_ids)
        rows.append(out.logits_per_image[0, 0])
    scale = network.logit_scale.exp().item()
    return torch.stack(rows) / scale, scale


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (20, 48)])
def test_equals_transformers(folder: Path, size: tuple[int, int]) -> None:
    images = pictures(*size)
    expected, scale = direct(folder, images)
    scores = ClipHead(model=str(folder), device="cpu").score(images, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    assert torch.allclose(scores, expected, atol=1e-5)
    assert scores.std() > 1e-3  # rows differ, so a mixed-up order would show
    scaled = ClipHead(model=str(folder), device="cpu", scaled=True).score(images, PROMPTS)
    assert torch.allclose(scaled, expected * scale, atol=1e-4) and scale > 2


def test_long_prompts_are_cut_and_unknown_words_are_spelt(folder: Path) -> None:
    head = ClipHead(model=str(folder), device="cpu")
    images = pictures(32, 32)[:2]
    scores = head.score(images, ["a red circle " * 50, "Übergröße 🦊"])
    assert scores.isfinite().all()


def test_prompts_are_cleaned(folder: Path) -> None:
    head = ClipHead(model=str(folder), device="cpu", batch_size=2)
    images = pictures(32, 32)[:1].repeat(3, 1, 1, 1)
    scores = head.score(images, ["“red” &amp; blue", '"red" & blue', "red blue"])
    assert torch.allclose(scores[0], scores[1], atol=1e-6) and (scores[0] - scores[2]).abs() > 1e-4


def test_half_precision_network_gives_float32_scores(folder: Path) -> None:
    images = pictures(32, 32)
    half = ClipHead(model=str(folder), device="cpu", dtype="bfloat16").score(images, PROMPTS)
    assert half.dtype == torch.float32
    assert torch.allclose(half, direct(folder, images)[0], atol=0.02)


def drop_weight(path: Path) -> None:
    save_file({k: v for k, v in load_file(path).items() if k != "text_projection.weight"}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is no directory"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x10" * 100), "cannot be opened"),
        (lambda d: drop_weight(d / "model.safetensors"), "lacks text_projection.weight, or has them in another shape"),
        (lambda d: (d / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda d: (d / "preprocessor_config.json").unlink(), "Can't load image processor"),
        (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "without tokenizer.json or vocab.json"),
    ],
)
def test_damage_is_a_model_error(folder: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        ClipHead(model=str(copy), device="cpu")
    assert "\n" not in str(caught.value)


def test_defaults() -> None:
    parameters = inspect.signature(ClipHead).parameters
    assert parameters["model"].default == "openai/clip-vit-large-patch14" and parameters["dtype"].default == "auto"
    head = ClipHead(model="shapes-clip", device="cpu")
    assert head.model_id == "shapes-clip" and head.revision is None
