"""`epd-ray doctor`: the versions, the device, the memory and the embedded models of this machine."""

import importlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from epd_ray.embedded.models import EMBEDDED

# A name in each package: diffusers and transformers import their parts when they are used, and fail only then.
PACKAGES = {
    "torch": "Tensor",
    "ray": "init",
    "diffusers": "AutoPipelineForText2Image",
    "transformers": "CLIPModel",
    "pyarrow": "Table",
    "numpy": "ndarray",
    "scipy": "optimize",
    "safetensors": "safe_open",
}
NEEDED_CORES, NEEDED_GIB = 2, 8


@dataclass(frozen=True)
class Finding:
    """What was examined, what was found, and how to mend it; `fix` is empty where nothing is wrong."""

    what: str
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Examine everything that a run needs. It takes a few seconds, because it imports all packages."""
    packages = [_package(name, part) for name, part in PACKAGES.items()]
    models = [_model(name, folder) for name, folder in EMBEDDED.items()]
    return [Finding("python", platform.python_version()), *packages, _device(), _cores(), _memory(), *models]


def show(findings: list[Finding]) -> bool:
    """Print a table, and a line per fix. Returns whether nothing is wrong."""
    console = Console()
    table = Table("", "", "found")
    for finding in findings:
        table.add_row("[red]mend[/]" if finding.fix else "[green]ok[/]", finding.what, finding.found)
    console.print(table)
    fixes = [f"{finding.what}: {finding.fix}" for finding in findings if finding.fix]
    for fix in fixes:
        console.print(fix, markup=False, highlight=False, soft_wrap=True)
    return not fixes


def _package(name: str, part: str) -> Finding:
    try:
        getattr(importlib.import_module(name), part)
        return Finding(name, metadata.version(name))
    except ModuleNotFoundError as error:
        return Finding(name, f"{error.name} is not installed", "pip install epd-ray installs it")
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        return Finding(name, "cannot be imported", f"{reason} (make a fresh virtual environment without torchvision)")


def _device() -> Finding:
    try:
        import torch

        from epd_ray.weights.devices import pick_device
    except (ImportError, OSError):
        return Finding("device", "torch is missing", "pip install torch")
    device = pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return Finding("device", f"auto = {device.type} ({name})")


def _cores() -> Finding:
    cores = os.cpu_count() or 1
    fix = "" if cores >= NEEDED_CORES else "run with cluster.rollout_actors=1 cluster.rollout_cpus=0.5"
    return Finding("cores", str(cores), fix)


def _memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    # Half a GiB less counts too, because the firmware and the kernel keep a part of the memory.
    fix = (
        "" if gib > NEEDED_GIB - 0.5 else f"the default run needs up to {NEEDED_GIB} GiB: use cluster.rollout_actors=1"
    )
    return Finding("memory", f"{gib:.1f} GiB", fix)


def _model(name: str, folder: Path) -> Finding:
    weights = list(folder.rglob("*.safetensors"))
    if not weights:
        return Finding(f"model {name}", f"no weights in {folder}", "reinstall epd-ray, or run jobs/build_shapes.py")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Finding(f"model {name}", f"{size / 2**20:.1f} MiB")
