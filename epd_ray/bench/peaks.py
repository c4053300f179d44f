"""What cards can do at most."""

import re

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
