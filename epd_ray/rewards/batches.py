"""What the heads share: device and precision of their networks, and scoring in batches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from epd_ray.errors import ConfigError
from epd_ray.weights.devices import pick_device, pick_dtype


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
    """
    rows = range(0, len(images), batch_size)
    parts = [score(images[i : i + batch_size], list(prompts[i : i + batch_size])).float().cpu() for i in rows]
    return torch.cat(parts) if parts else torch.empty(0)
