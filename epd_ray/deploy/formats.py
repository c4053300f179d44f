"""The formats of other tools that a solver can be written in; without torch, for the help of the command line."""

from collections.abc import Mapping
from typing import Literal

ExportFormat = Literal["sigmas", "diffusers", "json", "numpy", "comfyui"]
"""See `epd_ray.deploy.export.export`."""

ENDINGS: Mapping[ExportFormat, str] = {
    "sigmas": "_sigmas.txt",
    "diffusers": "_diffusers.py",
    "json": ".json",
    "numpy": ".npz",
    "comfyui": "_comfyui.py",
}
"""What follows a solver's name in the name of its file."""
