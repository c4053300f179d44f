"""Our heads against the published packages with the same random weights, in the packages' own environments."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from epd_ray.actors.environments import install
from epd_ray.rewards import HEADS
from epd_ray.rewards.preprocess import pil_pixels, tensor_pixels
from epd_ray.rewards.text import PromptTokenizer
from epd_ray.rewards.vit_h import from_open_clip
from tests.environments_fixture import real_home  # noqa: F401
from tests.tiny_heads import BERT_WORDS, MED

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("real_home")]

SCRIPTS = Path(__file__).parent / "parity"
NEAR = 1e-5

PROMPTS = [
    "a photo of 3 red cars, on the mat!",
    "“Curly” quotes, it\u2019s ﬁne &amp; well &amp;amp; done",
    "An UPPER-CASE caf\u00e9 <b>tag</b>  with   spaces\nand 12345 digits!!! ",
    "schÃ¶n: mojibake, 日本 and 🦊",
    "very long " * 60,
    "",
]
SQUARE = [(256, 256), (224, 224), (64, 64), (512, 512), (100, 100), (333, 333)]
OBLONG = [(300, 421), (225, 224), (227, 300), (64, 97), (512, 299), (224, 231)]  # (227, 300): crops at halves
SIZES = [
    pytest.param(SQUARE, marks=pytest.mark.slow, id="square"),
    pytest.param(OBLONG, marks=pytest.mark.nightly, id="oblong"),
]


def make(directory: Path, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Pictures as PNGs, and the same as float images [1, 3, H, W]."""
    (directory / "prompts.json").write_text(json.dumps(PROMPTS))
    generator = np.random.default_rng(0)
    images = []
    for i, size in enumerate(sizes):
        array = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(array).save(directory / f"{i}.png")
        images.append(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)
    return images


def run(environment: str, script: str, directory: Path) -> dict[str, Tensor]:
    """A script's answers, from the interpreter of EPD_RAY_PARITY_<ENVIRONMENT> or else the one that `install` makes."""
    python = os.environ.get(f"EPD_RAY_PARITY_{environment.upper()}") or install(environment)
    done = subprocess.run([python, SCRIPTS / script, directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, Tensor] = torch.load(directory / "answers.pt", weights_only=True)
    return answers


def far(name: str, directory: Path, images: list[Tensor], expected: Tensor) -> float:
    """The largest difference; rows must differ from each other by much more."""
    head = HEADS.get(name)(model=str(directory), device="cpu")
    scores = torch.cat([head.score(image, [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    assert expected.std() > 1e-3
    difference = (scores - expected).abs().max().item()
    print(f"{name}: {difference:.1e}")  # noqa: T201
    return difference


@pytest.mark.parametrize("sizes", SIZES)
def test_hpsv2(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    images = make(tmp_path, sizes)
    answers = run("hpsv2", "hpsv2_scores.py", tmp_path)
    pixels = torch.cat([tensor_pixels(image, 224) for image in images])
    assert torch.equal(pixels, answers["pixels"])
    words = PromptTokenizer(CLIPTokenizer.from_pretrained(tmp_path), 77, head="hpsv2.1", cleaned=True, padding=0)
    assert torch.equal(words(PROMPTS).input_ids, answers["tokens"])
    assert far("hpsv2.1", tmp_path, images, answers["cropped"]) < NEAR
    if sizes is SQUARE:
        assert torch.equal(answers["cropped"], answers["padded"])


@pytest.mark.parametrize("sizes", SIZES)
def test_imagereward_and_clip(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    images = make(tmp_path, sizes)
    save_bert(tmp_path)
    answers = run("imagereward", "imagereward_scores.py", tmp_path)
    pixels = torch.cat([pil_pixels(image, 224) for image in images])
    assert torch.equal(pixels, answers["pixels"])
    assert far("imagereward", tmp_path, images, answers["imagereward"]) < NEAR
    assert far("pickscore", tmp_path / "pickscore", images, answers["pickscore"]) < NEAR
    save_openai(tmp_path / "clip", torch.load(tmp_path / "openai.pt", weights_only=True))
    words = PromptTokenizer(CLIPTokenizer.from_pretrained(tmp_path / "clip"), 77, head="clip", cleaned=True, padding=0)
    assert torch.equal(words(PROMPTS).input_ids, answers["clip tokens"])
    shutil.copy(tmp_path / "sac+logos+ava1-l14-linearMSE.pth", tmp_path / "clip")
    assert far("aesthetic", tmp_path / "clip", images, answers["aesthetic"]) < NEAR
    if sizes is SQUARE:  # transformers' processor, which the clip head uses, crops oblong pictures half a pixel off
        assert far("clip", tmp_path / "clip", images, answers["clip"]) < NEAR


def save_bert(directory: Path) -> None:
    """A tokenizer where the package looks for it and where the head does, and the text tower's sizes."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = dict.fromkeys([*BERT_WORDS, *alphabet, *(f"##{letter}" for letter in alphabet)])
    words = {word: i for i, word in enumerate(vocabulary)}
    BertTokenizer(vocab=words).save_pretrained(directory)
    package = directory / "bert-base-uncased"
    package.mkdir()
    (package / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 256, "vocab_size": len(words) + 2}
    (directory / "med_config.json").write_text(json.dumps(MED | sizes))


def save_openai(directory: Path, tensors: dict[str, Tensor]) -> None:
    """OpenAI's state dict as a CLIPModel directory; the sizes are those of parity/imagereward_scores.py."""
    shared = {"num_hidden_layers": 2, "hidden_act": "quick_gelu", "projection_dim": 64, "hidden_size": 128}
    shared |= {"num_attention_heads": 2, "intermediate_size": 512}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(text_config=shared | ends, vision_config=shared | {"patch_size": 32}, projection_dim=64)
    network = CLIPModel(config)
    network.load_state_dict(from_open_clip(tensors))
    network.save_pretrained(directory)
    CLIPImageProcessorPil().save_pretrained(directory)
