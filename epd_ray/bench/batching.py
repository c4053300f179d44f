"""The time of an interval's points: in one batch, one after another, and against Euler steps of the same depth."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from epd_ray.bench.flops import speed, tflop_per_eval
from epd_ray.bench.models import EMBEDDED, RANDOM_MODELS, Subject, device_name, prompts
from epd_ray.bench.record import Record, Value, Values, under
from epd_ray.bench.timing import medians
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.types import Drift

POINTS = 2


def batching(subjects: Sequence[Subject] | None = None, repeats: int = 5) -> Record:
    """Median seconds of one interval of EPD for each model, in turns with other ways to do comparable work.

    On a GPU random models run with their own dtype at 512 and 1024 pixels with 1 and 8 pictures; on a CPU small models
    run in float32 with 1 and 4. `vs_sequential` is the time of K = 2 points in one batch over that of the points one
    after another. `vs_ddim` is the time of an interval (1 + 2 evaluations) over that of two Euler steps, which have the
    same parallel NFE; where arithmetic is the limit it cannot be less than 1.5. `tflops` is the network's speed in
    these two steps.

    Args:
        subjects: the models, whose resolution and dtype are set here; None means every random model.
        repeats: number of counted rounds, odd and at least 3.
    """
    gpu = torch.cuda.is_available()
    values: dict[str, Value] = {}
    for subject in subjects or [Subject(model) for model in RANDOM_MODELS]:
        for pixels in (512, 1024) if gpu and subject.model != EMBEDDED else (None,):
            sized = replace(subject, resolution=pixels, dtype="auto" if gpu else "float32")
            name = subject.model if pixels is None else f"{subject.model} {pixels} px"
            for batch in (1, 8) if gpu else (1, 4):
                values |= under(f"{name}, batch {batch}", _measure(sized, batch, repeats))
    return Record("batching", {"device": device_name()}, values)


def _measure(subject: Subject, batch: int, repeats: int) -> Values:
    backbone, guidance = subject.open()
    with torch.inference_mode():
        conditioning = backbone.encode(prompts(batch), guidance)
        x = backbone.initial(noises(backbone, range(batch)))
        sigmas = backbone.sigmas(4).tolist()
        a, b = sigmas[1], sigmas[2]
        drift = ConditionedDrift(backbone, conditioning)
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
        **speed(2 * tflop / seconds["ddim"]),
    }


def _interval(drift: Drift, x: Tensor, a: float, b: float, *, batched: bool) -> None:
    """The network's work in one EPD interval from sigma `a` to sigma `b`."""
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
