"""Floating-point operations: what a network takes, and what cards can do at most."""

import re

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from epd_ray.bench.models import prompts
from epd_ray.solvers.conditioned import conditioned_drift, noises
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
"""Dense bfloat16 products with float32 sums, by a part of the device's name; the first that fits. Source: NVIDIA's data
sheets, without sparsity."""


def peak_tflops(device: str) -> float | None:
    """A card's dense bfloat16 peak in TFLOP/s; None where it is not known.

    Args:
        device: as torch names it.
    """
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device)), None)


def operations(drift: Drift, x: Tensor, sigma: Tensor) -> int:
    """Of one drift, counted; attention spelled out, since its fused forms are not counted on every device.

    Args:
        drift: of the model.
        x: [B, ...].
        sigma: [B].
    """
    eager = torch.compiler.set_stance("force_eager")  # compiled code that a counter runs once stays uncompiled for good
    with torch.no_grad(), eager, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        drift(x, sigma)
    total: int = counter.get_total_flops()
    return total


def tflop_per_eval(backbone: Backbone, guidance_scale: float) -> float:
    """10^12 operations of one evaluation for one picture; of a whole batch, unfused attention may not fit."""
    with torch.inference_mode():
        drift = conditioned_drift(backbone, backbone.encode(prompts(1), guidance_scale))
        x, sigmas = backbone.initial(noises(backbone, [0])), backbone.sigmas(2)
        return 1e-12 * operations(drift, x, x.new_full((1,), float(sigmas[1])))


def speed(tflops: float, device: str) -> dict[str, float | None]:
    """TFLOP/s, those of the device at most, and the share; None where that is not known."""
    peak = peak_tflops(device)
    return {"tflops": tflops, "peak_tflops": peak, "of_peak": None if peak is None else tflops / peak}
