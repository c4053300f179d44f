"""Where a head's network runs, in which precision, and how many pictures at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from epd_ray.errors import ConfigError
from epd_ray.weights.devices import pick_device, pick_dtype


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a head's network; "auto" is float16 on CUDA and float32 elsewhere.

    Raises:
        ConfigError: no such device or dtype.
    """
    where = pick_device(device)
    if dtype == "auto":
        return where, torch.float16 if where.type == "cuda" else torch.float32
    return where, pick_dtype(dtype)


def check_batch_size(batch_size: int) -> int:
    """`batch_size` itself.

    Raises:
        ConfigError: less than 1.
    """
    if batch_size < 1:
        raise ConfigError([f"batch_size {batch_size} is less than 1: give the number of pictures per forward pass"])
    return batch_size


def in_batches(
    score: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: Sequence[str], batch_size: int
) -> Tensor:
    """Scores [B], float32 on the CPU, `batch_size` rows at a time.

    Args:
        score: images [b, 3, H, W] and b prompts to [b].
    """
    rows = range(0, len(images), batch_size)
    parts = [score(images[i : i + batch_size], list(prompts[i : i + batch_size])).float().cpu() for i in rows]
    return torch.cat(parts) if parts else torch.empty(0)
