"""What the K evaluations of an interval cost in one batch, one after another, and against one evaluation."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epd_ray.random_models import ARCHITECTURES, Size, random_backbone, random_conditioning
from epd_ray.sampling import conditioned_drift
from epd_ray.types import Drift

POINTS = 2


def batching(repeats: int = 5) -> dict[str, Any]:
    """Seconds of one interval per family, medians of interleaved repeats, and their ratios.

    On a GPU the published architectures run in bfloat16 at 512 and 1024 px, batch 1 and 8; else small ones in float32.
    `vs_sequential`: K = 2 in one batch against one after another. `vs_ddim`: an interval of EPD (1 + 2 evaluations)
    against two Euler steps, which have the same sequential depth; 1.5 is the floor where arithmetic is the limit.

    Args:
        repeats: odd, at least 3.
    """
    gpu = torch.cuda.is_available()
    size: Size = "full" if gpu else "small"
    cases = [(pixels, batch) for pixels in ((512, 1024) if gpu else (128,)) for batch in ((1, 8) if gpu else (1, 4))]
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpu else "cpu", "size": size}
    for name in ARCHITECTURES:
        for pixels, batch in cases:
            found[f"{name} {pixels} px, batch {batch}"] = _measure(name, size, pixels, batch, repeats)
    return found


def _measure(name: str, size: Size, pixels: int, batch: int, repeats: int) -> dict[str, float]:
    backbone = random_backbone(name, size, resolution=pixels, dtype="auto" if size == "full" else "float32")
    conditioning = random_conditioning(backbone, name, batch)
    x = backbone.initial(torch.stack([backbone.noise(seed) for seed in range(batch)]))
    sigmas = backbone.sigmas(4).tolist()
    a, b = sigmas[1], sigmas[2]
    drift = conditioned_drift(backbone, conditioning)
    with torch.inference_mode():
        ways: dict[str, Callable[[], None]] = {
            "batched": partial(_interval, drift, x, a, b, batched=True),
            "sequential": partial(_interval, drift, x, a, b, batched=False),
            "ddim": partial(_two_steps, drift, x, a, b),
        }
        seconds = _medians(ways, repeats)
    return {
        **{f"{way}_s": round(value, 4) for way, value in seconds.items()},
        "vs_sequential": round(seconds["batched"] / seconds["sequential"], 3),
        "vs_ddim": round(seconds["batched"] / seconds["ddim"], 3),
    }


def _interval(drift: Drift, x: Tensor, a: float, b: float, *, batched: bool) -> None:
    """The network's work in one EPD interval."""
    drift(x, x.new_full(x.shape[:1], a))
    inner = [a + (b - a) * (k + 1) / (POINTS + 1) for k in range(POINTS)]
    if batched:
        sigma = x.new_tensor(inner).repeat(len(x))
        drift(x.repeat_interleave(POINTS, 0), sigma)
    else:
        for s in inner:
            drift(x, x.new_full(x.shape[:1], s))


def _two_steps(drift: Drift, x: Tensor, a: float, b: float) -> None:
    for sigma in (a, b):
        drift(x, x.new_full(x.shape[:1], sigma))


def _medians(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Interleaved, so that a slow moment of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = _now()
            way()
            if repeat:  # the first warms up
                seconds[name].append(_now() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
