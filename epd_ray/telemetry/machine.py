"""Describes the machine that a measurement ran on."""

import os
import platform
import re
from pathlib import Path

import torch
from pydantic import JsonValue

from epd_ray.storage.run_directory import package_versions


def machine() -> dict[str, JsonValue]:
    """This machine's processor, cores, GPUs, torch threads, system and package versions, as JSON values."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": dict(package_versions()),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
