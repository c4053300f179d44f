"""What both scripts need. No import of epd_ray, and none of anything that the package at hand does not bring."""

import json
from pathlib import Path

import torch
from torch import nn

OPERATORS = []


def allow_torchvision() -> None:
    """torchvision's CUDA build beside CPU torch lacks two operators, which no preference model calls."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        OPERATORS.append(library)
        import torchvision  # noqa: F401


def randomise(module: nn.Module, seed: int) -> None:
    """Weights large enough that every part of a network shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 0:
            continue
        if p.ndim == 1:
            p.data = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        else:
            p.data = noise * p[0].numel() ** -0.5


def save_bpe(directory: Path, encoder: dict, ranks: dict) -> None:
    """A package's BPE in the files that transformers reads."""
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    directory.mkdir(exist_ok=True)
    vocabulary = {ends.get(word, word): number for word, number in encoder.items()}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(merge) for merge, _ in sorted(ranks.items(), key=lambda item: item[1])]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
