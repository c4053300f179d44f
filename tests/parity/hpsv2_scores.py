"""Run with an interpreter that has hpsv2: python hpsv2_scores.py DIRECTORY (with prompts.json and 0.png, 1.png...)."""

import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from common import allow_torchvision, randomise, save_bpe
from PIL import Image

allow_torchvision()
turtle = ModuleType("turtle")  # hpsv2 imports a name from it by mistake; the real one needs tkinter
turtle.forward = None
sys.modules.setdefault("turtle", turtle)

from hpsv2.src.open_clip import tokenizer, transform  # noqa: E402
from hpsv2.src.open_clip.model import CLIP  # noqa: E402


def main(directory: Path) -> None:
    prompts = json.loads((directory / "prompts.json").read_text())
    pictures = [Image.open(directory / f"{i}.png", formats=["PNG"]) for i in range(len(prompts))]
    vision = {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
    network = CLIP(64, vision, text, output_dict=True).eval()
    randomise(network, 0)
    save_bpe(directory, tokenizer._tokenizer.encoder, tokenizer._tokenizer.bpe_ranks)
    torch.save({"state_dict": network.state_dict()}, directory / "HPS_v2.1_compressed.pt")
    crop = transform.image_transform(224, is_train=False, resize_longest_max=False)
    pad = transform.image_transform(224, is_train=False, resize_longest_max=True)
    answers = {"tokens": tokenizer.tokenize(prompts), "pixels": torch.stack([crop(p) for p in pictures])}
    for name, pixels in {"cropped": answers["pixels"], "padded": torch.stack([pad(p) for p in pictures])}.items():
        with torch.no_grad():
            out = network(pixels, answers["tokens"])
        answers[name] = torch.diagonal(out["image_features"] @ out["text_features"].T)
    torch.save(answers, directory / "answers.pt")


main(Path(sys.argv[1]))
