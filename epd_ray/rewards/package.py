"""Reward heads that run the published packages themselves, for actors in a virtual environment of their own.

`epd-ray rewards install` makes those environments (epd_ray.actors.environments). They lack most of this package's
dependencies, so importing this module requires only torch, numpy and Pillow.
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

from epd_ray.errors import ModelError, shown
from epd_ray.rewards.batches import in_batches
from epd_ray.rewards.preprocess import to_bytes
from epd_ray.weights.devices import pick_device

MISSING_OPERATORS = ("nms", "qnms")
HEADS_FIX = "use `backend: package`, and run `epd-ray rewards install` on every node"
FID_FIX = "start it by FeaturePool, and run `epd-ray rewards install fid` on every node"


def _imagereward() -> ModuleType:
    """The package ImageReward, without its training code, which imports diffusers and datasets."""
    _torchvision()
    sys.modules.setdefault("ImageReward.ReFL", ModuleType("ImageReward.ReFL"))
    return _package("ImageReward")


def _hpsv2() -> ModuleType:
    """The hpsv2 package's copy of open_clip; an empty module replaces `turtle`, which it imports without need."""
    _torchvision()
    turtle = ModuleType("turtle")
    turtle.__dict__["forward"] = None
    sys.modules.setdefault("turtle", turtle)
    return _package("hpsv2.src.open_clip")


def _fid() -> ModuleType:
    """torch-fidelity's Inception network, which epd_ray.evaluation.metrics.inception uses."""
    _torchvision(FID_FIX)
    return _package("torch_fidelity.feature_extractor_inceptionv3", FID_FIX)


PACKAGES: dict[str, Callable[[], ModuleType]] = {"imagereward": _imagereward, "hpsv2": _hpsv2, "fid": _fid}
"""Maps each environment's name to the function that imports its package."""

_operators: list[torch.library.Library] = []  # kept, because torch drops operators when their Library is collected


def _torchvision(fix: str = HEADS_FIX) -> None:
    """Import torchvision; where its CUDA build meets CPU torch, define the two operators that it misses.

    The packages never call these operators.
    """
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
    """ImageReward (Xu et al. 2023), computed by the published package image-reward.

    Args:
        model: directory that holds ImageReward.pt and med_config.json, and also vocab.txt if bert-base-uncased cannot
            be downloaded; None lets the package download its files.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        batch_size: number of images per forward pass.

    Raises:
        ModelError: the package or a file is missing, or the weights do not fit.
    """

    def __init__(self, *, model: str | None = None, device: str = "auto", batch_size: int = 16) -> None:
        package = _imagereward()
        self.model_id, self.batch_size = model or "THUDM/ImageReward", batch_size
        self.device = pick_device(device)
        if model is None:
            cache = str(Path.home() / ".cache" / "ImageReward")  # where the package itself keeps its downloads
            download = package.utils.ImageReward_download
            weights, config = (Path(download(name, cache)) for name in ("ImageReward.pt", "med_config.json"))
        else:
            weights, config = _files(model, "ImageReward.pt", "med_config.json")
            _use_vocabulary(weights.parent)
        self.network = package.ImageReward(med_config=str(config), device=self.device)
        _load(self.network, weights, lambda saved: saved)
        self.network.to(self.device).eval()

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.network.blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(self.device)
        pixels = _preprocessed(self.network.preprocess, images).to(self.device)
        rewards: Tensor = self.network.score_gard(tokens.input_ids, tokens.attention_mask, pixels)
        return rewards[:, 0]


class PackageHpsv2:
    """HPS v2.1 (Wu et al. 2023), computed by the published package hpsv2; the network is loaded once, not per call.

    Args:
        model: directory that holds HPS_v2.1_compressed.pt, and also ViT-H-14.json if the network has other sizes; None
            downloads the published file.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU. CUDA computes in mixed
            precision, as in the package.
        batch_size: number of images per forward pass.

    Raises:
        ModelError: the package or a file is missing, or the weights do not fit.
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
            config = weights.parent / "ViT-H-14.json"
            if config.is_file():
                package.add_model_config(config)
        self.network, _, self.preprocess = package.create_model_and_transforms(
            "ViT-H-14", pretrained=None, precision="amp", device=self.device, light_augmentation=True, output_dict=True
        )  # pretrained=None, because the package would download LAION's weights, which are overwritten here
        _load(self.network, weights, lambda saved: saved["state_dict"])
        self.network.eval()
        self.tokenize = package.get_tokenizer("ViT-H-14")

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenize(prompts).to(self.device)
        pixels = _preprocessed(self.preprocess, images).to(self.device)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            found = self.network(pixels, tokens)
            return torch.diagonal(found["image_features"] @ found["text_features"].T)


def _files(model: str, *names: str) -> list[Path]:
    """The paths of the named files in a model directory.

    Raises:
        ModelError: a file is missing.
    """
    files = [Path(model).expanduser() / name for name in names]
    for file in files:
        if not file.is_file():
            raise ModelError(f"model {shown(model)} has no {file.name}: give a directory with {', '.join(names)}")
    return files


def _use_vocabulary(folder: Path) -> None:
    """Let the package load its tokenizer from `folder` instead of the hub, if vocab.txt is there."""
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
    """Load a checkpoint into a network. Unlike the packages, refuse one that leaves weights at their random values.

    Args:
        network: the network to fill.
        weights: file of the checkpoint.
        pick: returns the state dict from what the file holds.

    Raises:
        ModelError: the file cannot be read, or lacks weights of the network.
    """
    try:
        saved = pick(torch.load(weights, map_location="cpu", weights_only=True))
        missing = network.load_state_dict(saved, strict=False).missing_keys
    except Exception as error:  # torch raises many kinds of exceptions for a damaged file
        raise ModelError(f"{weights} cannot be loaded: {str(error).splitlines()[0]}") from error
    lost = [name for name in missing if not name.endswith("position_ids")]
    if lost:
        raise ModelError(
            f"{weights} lacks {len(lost)} of the network's tensors, such as {lost[0]}: give the published checkpoint"
        )


def _preprocessed(transform: Callable[[Image.Image], Tensor], images: Tensor) -> Tensor:
    """Pixels [B, 3, S, S] from images [B, 3, H, W] in [0, 1], by a package's own transform of 8-bit pictures."""
    arrays = to_bytes(images).permute(0, 2, 3, 1).numpy()
    return torch.stack([transform(Image.fromarray(np.ascontiguousarray(array))) for array in arrays])
