"""The tiny pipelines by name, opened, and watched while they work."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epd_ray.backbones.auto import open_backbone
from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.drawing.sampler import Sampler
from epd_ray.solvers.conditioned import noises
from tests import tiny_models
from tests.tiny_models import TOKENS

PROMPTS = ["a small red circle in the center on a white background", "a large blue star at the top"]
SEEDS = [3, 4]


def edit(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def ddpm_sample(folder: Path) -> Path:
    edit(tiny_models.save_ddpm(folder) / "scheduler/scheduler_config.json", prediction_type="sample")
    return folder


def sd3_dynamic(folder: Path) -> Path:
    scheduler = tiny_models.save_sd3(folder) / "scheduler/scheduler_config.json"
    edit(scheduler, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_models.save_sd,
    "sd_v": lambda folder: tiny_models.save_sd(folder, prediction_type="v_prediction"),
    "sdxl": tiny_models.save_sdxl,
    "sd3": tiny_models.save_sd3,
    "sd3_t5": lambda folder: tiny_models.save_sd3(folder, t5=True),
    "sd3_dynamic": sd3_dynamic,
    "sd3_wide": lambda folder: tiny_models.save_sd3(folder, t5=True, channels=16),  # as inpainting needs them
    "flux": tiny_models.save_flux,
    "flux_schnell": lambda folder: tiny_models.save_flux(folder, guidance_embeds=False),
    "ddpm": tiny_models.save_ddpm,
    "ddpm_sample": ddpm_sample,
    "ldm": tiny_models.save_ldm,
}
UNCONDITIONAL = {"ddpm", "ddpm_sample", "ldm"}
FREE = {"sd", "sd_v", "sdxl", "sd3", "sd3_t5", "sd3_dynamic", "sd3_wide"}  # classifier-free guidance
ONE_OF_EACH = ("sd", "sd_v", "sdxl", "sd3_t5", "flux", "ddpm", "ldm")
TEXT = ("sd", "sdxl", "sd3_t5", "flux")

T5 = ("text_encoder_3", "tokenizer_3")

_ROOT = tempfile.TemporaryDirectory()


@cache
def folder(name: str) -> Path:
    """The directory of a model, made when first asked for; not to be changed."""
    return MODELS[name](Path(_ROOT.name) / name)


def load(folder: Path, **options: Any) -> PipelineBackbone:
    plain = {"device": "cpu", "dtype": "float32", "resolution": 16, "max_sequence_length": TOKENS}
    opened = open_backbone(model=str(folder), **{**plain, **options})
    assert isinstance(opened, PipelineBackbone)
    return opened


@cache
def backbones(name: str) -> PipelineBackbone:
    """A model opened with the plain options; not to be changed."""
    return load(folder(name))


def denoiser(backbone: PipelineBackbone) -> Any:
    components = backbone.pipeline.components
    return components["transformer"] if "transformer" in components else components["unet"]


class Calls:
    """What a module is called with, while watched: its first input and its timestep."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.first: list[Tensor] = []
        self.timesteps: list[Any] = []
        self._hook = module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.first.append(args[0] if args else next(iter(kwargs.values())))
        self.timesteps.append(args[1] if len(args) > 1 else kwargs.get("timestep"))

    @property
    def batches(self) -> list[int]:
        return [len(first) for first in self.first]

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def run(backbone: PipelineBackbone, sampler: Sampler, guidance_scale: float) -> Tensor:
    return sampler.run(backbone, backbone.encode(PROMPTS, guidance_scale), noises(backbone, SEEDS))
