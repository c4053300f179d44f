"""Floating-point operations: how many a network's evaluation takes, and how many a GPU can do in a second."""

import re

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from epd_ray.bench.models import device_name, prompts
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.types import Backbone, Drift

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""A part of a GPU's name -> peak in TFLOP/s of dense bfloat16 products with float32 sums, without sparsity. The first
part that fits counts. Source: NVIDIA's data sheets."""


def peak_tflops(device: str) -> float | None:
    """The dense bfloat16 peak of a GPU in TFLOP/s, or None where it is not known.

    Args:
        device: name of the GPU, as torch gives it.
    """
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device)), None)


def operations(drift: Drift, x: Tensor, sigma: Tensor) -> int:
    """Number of operations of one call of a drift.

    Attention is computed without its fused kernels, which torch does not count on every device.

    Args:
        drift: the function whose operations are counted.
        x: latents [B, ...].
        sigma: sigmas [B].
    """
    eager = torch.compiler.set_stance("force_eager")  # compiled code that a counter runs once stays uncompiled for good
    with torch.no_grad(), eager, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        drift(x, sigma)
    total: int = counter.get_total_flops()
    return total


def tflop_per_eval(backbone: Backbone, guidance_scale: float) -> float:
    """10^12 operations of one evaluation for one picture, counted with one, because unfused attention takes memory."""
    with torch.inference_mode():
        drift = ConditionedDrift(backbone, backbone.encode(prompts(1), guidance_scale))
        x, sigmas = backbone.initial(noises(backbone, [0])), backbone.sigmas(2)
        return 1e-12 * operations(drift, x, x.new_full((1,), float(sigmas[1])))


def speed(tflops: float) -> dict[str, float | None]:
    """A speed in TFLOP/s, the peak of this machine's GPU, and their ratio; None where the peak is not known."""
    peak = peak_tflops(device_name())
    return {"tflops": tflops, "peak_tflops": peak, "of_peak": None if peak is None else tflops / peak}
