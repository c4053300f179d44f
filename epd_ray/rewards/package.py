"""The published packages, two of them as heads, for actors whose environment holds them (see environments).

Nothing here needs more than torch, numpy and Pillow at import: the environments have little else of this package's.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from epd_ray.errors import ModelError
from epd_ray.weights.devices import pick_device

MISSING_OPERATORS = ("nms", "qnms")
HEADS_FIX = "use `backend: package`, and run `epd-ray rewards install` on every node"
FID_FIX = "start it by FeaturePool, and run `epd-ray rewards install fid` on every node"


def _imagereward() -> ModuleType:
    """The package, without its training half, which drags in diffusers and datasets."""
    _torchvision()
    sys.modules.setdefault("ImageReward.ReFL", ModuleType("ImageReward.ReFL"))
    return _package("ImageReward")


def _hpsv2() -> ModuleType:
    """The package's copy of open_clip, which imports `turtle`, and so tkinter, for nothing."""
    _torchvision()
    turtle = ModuleType("turtle")
    turtle.__dict__["forward"] = None
    sys.modules.setdefault("turtle", turtle)
    return _package("hpsv2.src.open_clip")


def _fid() -> ModuleType:
    """torch-fidelity's Inception, for metrics.inception."""
    _torchvision(FID_FIX)
    return _package("torch_fidelity.feature_extractor_inceptionv3", FID_FIX)


PACKAGES: dict[str, Callable[[], ModuleType]] = {"imagereward": _imagereward, "hpsv2": _hpsv2, "fid": _fid}
"""How each environment's package is imported."""

_operators: list[torch.library.Library] = []  # torch forgets operators whose library object is gone


def _torchvision(fix: str = HEADS_FIX) -> None:
    """Import torchvision; its CUDA build beside CPU torch lacks two operators, which nothing here calls."""
    try:
        _package("torchvision", fix)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in MISSING_OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(library)
        _package("torchvision", fix)


def _package(name: str, fix: str = HEADS_FIX) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(f"{error.name} is not installed for {sys.executable}: {fix}") from error


class PackageImageReward:
    """ImageReward (Xu et al. 2023) by the package image-reward itself.

    Args:
        model: a directory with ImageReward.pt and med_config.json, and vocab.txt where bert-base-uncased cannot be
            fetched; None for the package's own download.
        device: as everywhere.
        batch_size: images per forward pass.
    """

    def __init__(self, *, model: str | None = None, device: str = "auto", batch_size: int = 16) -> None:
        package = _imagereward()
        self.model_id, self.batch_size = model or "THUDM/ImageReward", batch_size
        self.device = pick_device(device)
        if model is None:
            cache = str(Path.home() / ".cache" / "ImageReward")
            download = package.utils.ImageReward_download
            weights, layout = (Path(download(name, cache)) for name in ("ImageReward.pt", "med_config.json"))
        else:
            weights, layout = _files(model, "ImageReward.pt", "med_config.json")
            _use_vocabulary(weights.parent)
        self.network = package.ImageReward(med_config=str(layout), device=self.device)
        _load(self.network, weights, lambda saved: saved)
        self.network.to(self.device).eval()

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return _in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.network.blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(self.device)
        pixels = _preprocessed(self.network.preprocess, images).to(self.device)
        rewards: Tensor = self.network.score_gard(tokens.input_ids, tokens.attention_mask, pixels)
        return rewards[:, 0]


class PackageHpsv2:
    """HPS v2.1 (Wu et al. 2023) by the package hpsv2 itself, loaded once rather than on every call.

    Args:
        model: a directory with HPS_v2.1_compressed.pt, and ViT-H-14.json where the network has another size; None for
            the package's own download.
        device: as everywhere; as in the package, a GPU computes in mixed precision.
        batch_size: images per forward pass.
    """

    def __init__(self, *, model: str | None = None, device: str = "auto", batch_size: int = 16) -> None:
        package = _hpsv2()
        self.model_id, self.batch_size = model or "xswu/HPSv2", batch_size
        self.device = pick_device(device)
        if model is None:
            fetch = importlib.import_module("huggingface_hub").hf_hub_download
            weights = Path(fetch("xswu/HPSv2", "HPS_v2.1_compressed.pt"))
        else:
            (weights,) = _files(model, "HPS_v2.1_compressed.pt")
            layout = weights.parent / "ViT-H-14.json"
            if layout.is_file():
                package.add_model_config(layout)
        self.network, _, self.preprocess = package.create_model_and_transforms(
            "ViT-H-14", pretrained=None, precision="amp", device=self.device, light_augmentation=True, output_dict=True
        )  # pretrained: the package would fetch LAION's weights, to overwrite them
        _load(self.network, weights, lambda saved: saved["state_dict"])
        self.network.eval()
        self.tokenize = package.get_tokenizer("ViT-H-14")

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return _in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenize(prompts).to(self.device)
        pixels = _preprocessed(self.preprocess, images).to(self.device)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            found = self.network(pixels, tokens)
            return torch.diagonal(found["image_features"] @ found["text_features"].T)


def _files(model: str, *names: str) -> list[Path]:
    """The files of a model directory.

    Raises:
        ModelError: one is missing.
    """
    files = [Path(model).expanduser() / name for name in names]
    for file in files:
        if not file.is_file():
            raise ModelError(f"model {model!r} has no {file.name}: give a directory with {', '.join(names)}")
    return files


def _use_vocabulary(folder: Path) -> None:
    """Let the package's tokenizer read `folder` where it would ask the hub, if the words are there."""
    if not (folder / "vocab.txt").is_file():
        return
    blip = _package("ImageReward.models.BLIP.blip")
    bert = blip.BertTokenizer

    class Local:
        @staticmethod
        def from_pretrained(_: str) -> Any:
            return bert.from_pretrained(str(folder))

    blip.__dict__["BertTokenizer"] = Local


def _load(network: torch.nn.Module, weights: Path, pick: Callable[[Any], dict[str, Tensor]]) -> None:
    """Load a checkpoint into a network, and refuse one that leaves a part of it random (as the package would not).

    Raises:
        ModelError: the file cannot be read, or does not fit.
    """
    try:
        saved = pick(torch.load(weights, map_location="cpu", weights_only=True))
        missing = network.load_state_dict(saved, strict=False).missing_keys
    except Exception as error:  # torch raises half a dozen kinds here, one of them pickle's
        raise ModelError(f"{weights} cannot be loaded: {str(error).splitlines()[0]}") from error
    lost = [name for name in missing if not name.endswith("position_ids")]
    if lost:
        raise ModelError(f"{weights} lacks {len(lost)} of the network's tensors, such as {lost[0]}: not this model's")


def _preprocessed(transform: Callable[[Image.Image], Tensor], images: Tensor) -> Tensor:
    """Pixels [B, 3, S, S] by a package's own transform; images are rounded to 8 bits first, as a file would be."""
    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([transform(Image.fromarray(np.ascontiguousarray(array))) for array in arrays])


def _in_batches(
    score: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: Sequence[str], size: int
) -> Tensor:
    """Scores [B], float32 on the CPU."""
    starts = range(0, len(images), size)
    parts = [score(images[i : i + size], list(prompts[i : i + size])).float().cpu() for i in starts]
    return torch.cat(parts)
