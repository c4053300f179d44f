"""What the K evaluations of an interval cost in one batch, one after another, and against one evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epd_ray.bench.flops import speed, tflop_per_eval
from epd_ray.bench.models import MODELS, Subject, prompts
from epd_ray.bench.random_models import Size
from epd_ray.bench.timing import medians
from epd_ray.solvers.conditioned import conditioned_drift, noises
from epd_ray.types import Drift

POINTS = 2


def batching(
    model: str | None = None, size: Size | None = None, compile: bool = False, repeats: int = 5
) -> dict[str, Any]:
    """Seconds of one interval per model, medians of interleaved repeats, and their ratios.

    On a GPU the published architectures run in bfloat16 at 512 and 1024 px, batch 1 and 8; else small ones in float32.
    `vs_sequential`: K = 2 in one batch against one after another. `vs_ddim`: an interval of EPD (1 + 2 evaluations)
    against two Euler steps, which have the same sequential depth; 1.5 is the floor where arithmetic is the limit.
    `tflops` are the network's operations over the time of those two steps.

    Args:
        model: one of MODELS; None: all with random weights.
        size: see Subject.
        compile: see Subject.
        repeats: odd, at least 3.
    """
    gpu = torch.cuda.is_available()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpu else "cpu"}
    for name in MODELS[1:] if model is None else (model,):
        for pixels in (512, 1024) if gpu and name != MODELS[0] else (None,):
            subject = Subject(name, size, pixels, "auto" if gpu else "float32", compile)
            for batch in (1, 8) if gpu else (1, 4):
                key = f"{name}, batch {batch}" if pixels is None else f"{name} {pixels} px, batch {batch}"
                found[key] = _measure(subject, batch, repeats)
    return found


def _measure(subject: Subject, batch: int, repeats: int) -> dict[str, float | None]:
    backbone, guidance = subject.open()
    with torch.inference_mode():
        conditioning = backbone.encode(prompts(batch), guidance)
        x = backbone.initial(noises(backbone, range(batch)))
        sigmas = backbone.sigmas(4).tolist()
        a, b = sigmas[1], sigmas[2]
        drift = conditioned_drift(backbone, conditioning)
        ways: dict[str, Callable[[], None]] = {
            "batched": partial(_interval, drift, x, a, b, batched=True),
            "sequential": partial(_interval, drift, x, a, b, batched=False),
            "ddim": partial(_two_steps, drift, x, a, b),
        }
        seconds = medians(ways, repeats)
        tflop = batch * tflop_per_eval(backbone, guidance)
    return {
        **{f"{way}_s": round(value, 4) for way, value in seconds.items()},
        "vs_sequential": round(seconds["batched"] / seconds["sequential"], 3),
        "vs_ddim": round(seconds["batched"] / seconds["ddim"], 3),
        **speed(2 * tflop / seconds["ddim"], str(subject.facts["device"])),
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
