"""What the heads share: device and precision of their networks, scoring in batches, and what risk is subtracted."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from epd_ray.errors import ConfigError, RewardError
from epd_ray.weights.devices import pick_device, pick_dtype

logger = logging.getLogger(__name__)

LARGEST_RATIO = 16  # of a picture's sides; the heads resize its shorter side to some hundred pixels before they crop

Item = TypeVar("Item")


def place(device: str, dtype: str, half: torch.dtype = torch.float16) -> tuple[torch.device, torch.dtype]:
    """The torch device and dtype of a head's network; dtype "auto" is `half` on CUDA and float32 elsewhere.

    Args:
        device: name of a torch device, or "auto".
        dtype: name of a dtype, or "auto".
        half: the half precision that the network was trained in; float16 cannot hold what a bfloat16 network computes.

    Raises:
        ConfigError: the device is not available, or the dtype is unknown.
    """
    found = pick_device(device)
    if dtype == "auto":
        return found, half if found.type == "cuda" else torch.float32
    return found, pick_dtype(dtype)


def check_batch_size(batch_size: int) -> int:
    """Return `batch_size` if it is valid.

    Raises:
        ConfigError: it is less than 1.
    """
    if batch_size < 1:
        raise ConfigError([f"batch_size {batch_size} is less than 1: give the number of pictures per forward pass"])
    return batch_size


def check_risk(risk: float) -> float:
    """Return `risk` if it is valid.

    Raises:
        ConfigError: it is negative or not finite.
    """
    if not (math.isfinite(risk) and risk >= 0):
        raise ConfigError([f"risk {risk} is not a number of at least 0: give the standard deviations to subtract"])
    return risk


def cautious(head: str, means: Tensor, deviations: Tensor, risk: float) -> Tensor:
    """The scores [b]: means minus `risk` times their standard deviations, whose mean and largest are logged.

    Args:
        head: name of the reward head in the log.
        means: [b], the scores as the model expects them.
        deviations: [b], the model's own uncertainty about them, as a standard deviation, >= 0.
        risk: standard deviations that are subtracted, >= 0.
    """
    logger.info(
        "%s: the standard deviation of %d scores is %.4g on average and %.4g at most, of which %g times is subtracted",
        head, len(means), deviations.mean(), deviations.max(), risk,
    )  # fmt: skip
    return means - risk * deviations


def in_batches(
    score: Callable[[Tensor, list[Item]], Tensor], images: Tensor, items: Sequence[Item], batch_size: int
) -> Tensor:
    """Score B pictures, `batch_size` at a time; returns float32 [B] on the CPU.

    Args:
        score: returns the scores [b] of images [b, 3, H, W] and b items.
        images: [B, 3, H, W], float in [0, 1].
        items: what each of the B pictures is scored against, a prompt for most heads.
        batch_size: number of pictures per call of `score`, at least 1.

    Raises:
        RewardError: the pictures are too long, see `too_long`.
    """
    check_sides(images)
    rows = range(0, len(images), batch_size)
    parts = [score(images[i : i + batch_size], list(items[i : i + batch_size])).float().cpu() for i in rows]
    return torch.cat(parts) if parts else torch.empty(0)


def check_sides(images: Tensor) -> None:
    """Refuse pictures [B, 3, H, W] that are too long, see `too_long`.

    Raises:
        RewardError: they are.
    """
    if problem := too_long(images.shape[2], images.shape[3]):
        raise RewardError("preprocessing", problem)


def too_long(height: int, width: int) -> str:
    """Why a picture's sides, in pixels, are too different for a head; else "".

    Without this bound a picture of 1 x 30000 pixels, which is resized before it is cropped, would take gigabytes.
    """
    if max(height, width) <= LARGEST_RATIO * min(height, width):
        return ""
    return (
        f"a picture has {height} x {width} pixels (height x width), but a head judges pictures "
        f"whose longer side is at most {LARGEST_RATIO} times the shorter one: crop it"
    )
