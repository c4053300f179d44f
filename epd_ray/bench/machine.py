"""What a measurement ran on."""

import os
import platform
import re
from pathlib import Path

import torch
from pydantic import JsonValue

from epd_ray.store import package_versions

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


def machine() -> dict[str, JsonValue]:
    """Processor, cores, GPUs, threads and package versions."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": dict(package_versions()),
    }


def peak_tflops(device: str) -> float | None:
    """A card's dense bfloat16 peak in TFLOP/s; None where it is not known.

    Args:
        device: as torch names it.
    """
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device)), None)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
