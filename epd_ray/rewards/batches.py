"""What the heads share: device and precision of their networks, and scoring in batches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from epd_ray.errors import ConfigError, RewardError
from epd_ray.weights.devices import pick_device, pick_dtype

LARGEST_RATIO = 16  # of a picture's sides; the heads resize its shorter side to some hundred pixels before they crop


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The torch device and dtype of a head's network; dtype "auto" is float16 on CUDA and float32 elsewhere.

    Raises:
        ConfigError: the device is not available, or the dtype is unknown.
    """
    found = pick_device(device)
    if dtype == "auto":
        return found, torch.float16 if found.type == "cuda" else torch.float32
    return found, pick_dtype(dtype)


def check_batch_size(batch_size: int) -> int:
    """Return `batch_size` if it is valid.

    Raises:
        ConfigError: it is less than 1.
    """
    if batch_size < 1:
        raise ConfigError([f"batch_size {batch_size} is less than 1: give the number of pictures per forward pass"])
    return batch_size


def in_batches(
    score: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: Sequence[str], batch_size: int
) -> Tensor:
    """Score B pictures, `batch_size` at a time; returns float32 [B] on the CPU.

    Args:
        score: returns the scores [b] of images [b, 3, H, W] and b prompts.
        images: [B, 3, H, W], float in [0, 1].
        prompts: B texts.
        batch_size: number of pictures per call of `score`, at least 1.

    Raises:
        RewardError: the pictures are too long, see `too_long`.
    """
    if problem := too_long(images.shape[2], images.shape[3]):
        raise RewardError("preprocessing", problem)
    rows = range(0, len(images), batch_size)
    parts = [score(images[i : i + batch_size], list(prompts[i : i + batch_size])).float().cpu() for i in rows]
    return torch.cat(parts) if parts else torch.empty(0)


def too_long(height: int, width: int) -> str:
    """Why a picture's sides, in pixels, are too different for a head, which judges the central square; else "".

    Without this bound a picture of 1 x 30000 pixels, which is resized before it is cropped, would take gigabytes.
    """
    if max(height, width) <= LARGEST_RATIO * min(height, width):
        return ""
    return (
        f"a picture has {height} x {width} pixels (height x width), but a head judges the central square of a picture "
        f"whose longer side is at most {LARGEST_RATIO} times the shorter one: crop it"
    )
