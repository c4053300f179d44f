"""`epd-ray sample`: pictures by a saved solver, on the model that its file names or on another model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from epd_ray.backbones import BACKBONES
from epd_ray.config.sections import AUTO, OPENED, PIPELINE
from epd_ray.drawing.sampler import finite_pictures, learned
from epd_ray.drawing.truncation import warn_of_truncation
from epd_ray.errors import ConfigError, ModelError, TableError, first_problem, shown
from epd_ray.solvers import Solver, check_fit
from epd_ray.solvers.conditioned import noises
from epd_ray.types import Backbone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleOptions:
    """Settings of `sample` that replace those in the solver file; None keeps those of the file.

    Attributes:
        model: a pipeline directory or a hub id.
        guidance_scale: the guidance scale.
        resolution: pixels per side.
        device: a torch device, or "auto".
        dtype: the precision of the network, or "auto".
        family: a backbone class of the user, as "module:Class".
    """

    model: str | None = None
    guidance_scale: float | None = None
    resolution: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    family: str | None = None


class _MadeWith(BaseModel):
    """The metadata of a solver that determine how its model is loaded."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    backbone: str
    model_id: str | None = None
    revision: str | None = None
    resolution: int | None = None
    guidance_scale: float | None = None
    registry: str = AUTO
    options: dict[str, JsonValue] = {}


def sample(solver_name: str, prompts: Sequence[str], seed: int, out: Path, options: SampleOptions) -> Path:
    """Draw one picture per prompt with a saved solver, and write them side by side into one file.

    Args:
        solver_name: a solver directory, the name of a preset, or a hub id.
        prompts: at least one prompt.
        seed: the noise seed; prompt i uses seed + i.
        out: the image file to write; its suffix names the format.
        options: settings that replace those of the solver file.

    Returns:
        The path of the image file.

    Raises:
        ConfigError: `out` is not an image file, or the backbone does not have one of the options.
        TableError: the solver cannot be read, or is for another kind of model.
        ModelError: the model cannot be loaded, or a picture is not finite; nothing is written then.
    """
    if out.is_dir() or out.suffix.lower() not in Image.registered_extensions():
        raise ConfigError([f"--out {out} is not an image file: give a name that ends in .png"])
    solver = Solver.from_pretrained(solver_name)
    try:
        made = _MadeWith.model_validate(dict(solver.meta))
    except ValidationError as error:
        problem = f"solver {solver_name}: meta.{first_problem(error)} (take the solver of a run, or a preset)"
        raise TableError(problem) from error
    backbone = _open(made, solver_name, options)
    guidance = next(
        g for g in (options.guidance_scale, made.guidance_scale, backbone.default_guidance) if g is not None
    )
    for warning in check_fit(solver, solver_name, backbone.family, backbone.form, guidance, backbone.facts):
        log.warning(warning)
    warn_of_truncation(backbone.truncated(prompts), len(prompts))
    conditioning = backbone.encode(list(prompts), guidance)
    noise = noises(backbone, [seed + i for i in range(len(prompts))])
    with torch.inference_mode():
        latents = learned(solver, "sample", "sample").run(backbone, conditioning, noise)
    images = finite_pictures(backbone, latents).permute(0, 2, 3, 1).numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(images), axis=1)).save(out)
    return out


def _open(made: _MadeWith, name: str, options: SampleOptions) -> Backbone:
    """Load the model that the solver file names, or the one in the options."""
    registry = options.family or made.registry
    if (
        options.family is None and registry not in BACKBONES.names()
    ):  # a downloaded file must not choose the code that runs
        raise TableError(
            f"solver {name} was made with the backbone {shown(registry)}, which is code from outside of this package: "
            f"to run it, pass --family {registry}"
        )
    model = options.model or made.model_id
    if registry not in OPENED:
        if (options.device, options.dtype, options.resolution) != ("auto", "auto", None):
            raise ConfigError(
                [f"backbone {shown(registry)} takes no --device, --dtype or --resolution: leave them out"]
            )
        arguments: dict[str, Any] = dict(made.options)
        return BACKBONES.build(registry, arguments | ({"model": options.model} if options.model else {}))
    if model is None:
        raise TableError(f"solver {name} does not say which model it is for: pass --model")
    arguments = {
        "model": model,
        "revision": made.revision if options.model is None else None,
        "resolution": options.resolution or made.resolution,
        "max_sequence_length": made.options.get("max_sequence_length"),
        "device": options.device,
        "dtype": options.dtype,
        **({"call": made.options.get("call")} if registry == PIPELINE else {}),
    }
    try:
        return BACKBONES.build(registry, arguments)
    except ModelError as error:
        named = "--model" if options.model else f"solver {name}, whose model another --model would replace"
        raise type(error)(f"{named}: {error}") from error
