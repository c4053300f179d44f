import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from epd_ray.errors import ConfigError
from epd_ray.rewards import HEADS
from epd_ray.rewards.batches import check_batch_size, place
from epd_ray.rewards.preprocess import centre_crop, normalise, pil_pixels, short_side, tensor_pixels
from epd_ray.rewards.text import PromptTokenizer, clean
from tests.tiny_heads import save_bpe, save_hpsv2, save_imagereward, save_mps
from tests.tiny_models import save_clip


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a red circle", "a red circle"),
        ("“curly” it’s", '"curly" it\'s'),  # noqa: RUF001
        ("ﬁne", "fine"),
        ("a &amp; b &amp;amp; c", "a & b & c"),
        ("a < b &amp;amp; c", "a < b & c"),
        ("schÃ¶n", "schön"),
        ("  spaces ", "spaces"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_ids(tmp_path: Path) -> None:
    end = save_bpe(tmp_path) - 1
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    raw, cleaned = (PromptTokenizer(tokenizer, 8, head="x", cleaned=c, padding=0) for c in (False, True))
    assert torch.equal(cleaned(["red&amp;x"]).input_ids, raw(["red&x"]).input_ids)
    assert not torch.equal(raw(["red&amp;x"]).input_ids, raw(["red&x"]).input_ids)
    ids = raw(["x"]).input_ids[0].tolist()
    assert ids[0] == end - 1 and ids[2:] == [end, 0, 0, 0, 0, 0]
    assert raw(["x " * 50]).input_ids[0, -1] == end
    assert PromptTokenizer(tokenizer, 8, head="x")(["x"]).input_ids[0, -1] == tokenizer.pad_token_id != 0


@pytest.mark.parametrize(
    ("name", "save", "length"),
    [
        ("clip", save_clip, 20),
        ("pickscore", save_clip, 20),
        ("hpsv2.1", save_hpsv2, 24),
        ("imagereward", save_imagereward, 35),
        ("mps", save_mps, 24),
    ],
)
def test_long_prompts_are_cut_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, save: Callable[[Path], Path], length: int
) -> None:
    options = {"condition": "light"} if name == "mps" else {}
    head = HEADS.get(name)(model=str(save(tmp_path)), device="cpu", batch_size=2, **options)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
    with caplog.at_level(logging.WARNING):
        assert head.score(images[:2], ["x", "x x"]).isfinite().all() and not caplog.records
        scores = head.score(images, ["x " * 50, "x " * 60, "x", "x " * 50])
        head.score(images, ["x " * 50] * 4)
    assert [r.name for r in caplog.records] == ["epd_ray.rewards.text"]
    text = caplog.records[0].getMessage()
    assert f"takes {length} tokens: 2 of 2 prompts are longer" in text and "\n" not in text
    assert torch.allclose(scores[0], scores[1], atol=1e-6) and scores[0] != scores[2]


@pytest.mark.parametrize("size", [(48, 48), (60, 32), (32, 52), (20, 36)])  # all of which crop at whole pixels
def test_pixels_equal_transformers_pil_ones(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    square = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    files = [Image.fromarray(np.round(255 * i.permute(1, 2, 0).numpy()).astype(np.uint8)) for i in images]
    expected = processor(files, return_tensors="pt").pixel_values
    assert torch.allclose(pil_pixels(images, 32), expected, atol=1e-6)
    assert pil_pixels(images, 32).shape == tensor_pixels(images, 32).shape == (2, 3, 32, 32)
    assert min(size) == 32 or (tensor_pixels(images, 32) - expected).abs().max() > 0.01


@pytest.mark.parametrize("size", [(48, 48), (60, 33), (20, 20)])
def test_float_pixels_are_resized_as_pil_resizes_floats(size: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    width, height = short_side((size[1], size[0]), 32)
    planes = [Image.fromarray(np.asarray(plane)) for plane in (images[0] * 255).round() / 255]
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
    expected = normalise(centre_crop(torch.from_numpy(np.stack(resized))[None], 32))
    assert torch.allclose(tensor_pixels(images, 32), expected, atol=1e-4)


def test_crops_as_torchvision_does() -> None:
    assert short_side((300, 421), 224) == (224, 314) and short_side((421, 300), 224) == (314, 224)
    row = torch.arange(7.0).view(1, 1, 1, 7).expand(1, 1, 4, 7)
    assert centre_crop(row, 4)[0, 0, 0].tolist() == [2, 3, 4, 5]  # 1.5 is rounded to 2
    assert centre_crop(row[..., :5], 4)[0, 0, 0].tolist() == [0, 1, 2, 3]  # 0.5 to 0


def test_where_networks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert place("cpu", "bfloat16")[1] == torch.bfloat16
    monkeypatch.setattr("epd_ray.rewards.batches.pick_device", lambda name: torch.device("cuda:0"))
    assert place("auto", "auto")[1] == torch.float16
    with pytest.raises(ConfigError, match="batch_size 0 is less than 1"):
        check_batch_size(0)
