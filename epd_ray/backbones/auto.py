"""Open a diffusers pipeline by directory or hub id; its model_index.json says which family it belongs to."""

import inspect
from dataclasses import replace
from typing import Any

from epd_ray.backbones.loading import Index, PipelineOptions, open_pipeline, read_index
from epd_ray.backbones.pipeline import Family, PipelineBackbone
from epd_ray.errors import ModelError, shown
from epd_ray.registry import Registry

FAMILIES: "Registry[Family]" = Registry(
    "pipeline class",
    {
        "DDIMPipeline": "epd_ray.backbones.ddpm:DDPMFamily",
        "DDPMPipeline": "epd_ray.backbones.ddpm:DDPMFamily",
        "FluxPipeline": "epd_ray.backbones.flux:FluxFamily",
        "LDMPipeline": "epd_ray.backbones.ddpm:DDPMFamily",
        "StableDiffusion3Pipeline": "epd_ray.backbones.sd3:SD3Family",
        "StableDiffusionPipeline": "epd_ray.backbones.sd:SDFamily",
        "StableDiffusionXLPipeline": "epd_ray.backbones.sd:SDXLFamily",
    },
)
UNCONDITIONAL = ("DDIMPipeline", "DDPMPipeline", "LDMPipeline")


def open_backbone(**options: Any) -> PipelineBackbone:
    """Open a pipeline as a backbone.

    Args:
        options: the fields of PipelineOptions.

    Raises:
        ModelError: the model is missing, damaged, gated, or of a family that is not supported; or an option has a value
            that it cannot have.
        ConfigError: the device or dtype is not available.
    """
    opened = PipelineOptions(**options)
    index = supported_index(opened.model, opened.revision)
    if opened.dtype == "auto" and index.class_name in UNCONDITIONAL:
        opened = replace(opened, dtype="float32")  # small networks, judged by statistics that are sensitive to rounding
    denoiser = "transformer" if "transformer" in index.components else "unet"
    pipeline = open_pipeline(index, opened, denoiser)
    family: Family = FAMILIES.build(index.class_name, {"pipeline": pipeline, "options": opened})
    return PipelineBackbone(pipeline, family, opened, index.commit, index.fingerprint)


def supported_index(model: str, revision: str | None) -> Index:
    """Read which pipeline a model is, see `read_index`.

    Raises:
        ModelError: there is no such model, it is not a pipeline, or its family is not supported.
    """
    index = read_index(model, revision)
    if index.class_name not in FAMILIES.names():
        known = ", ".join(FAMILIES.names())
        raise ModelError(f"model {shown(model)} is a {index.class_name}, supported are: {known}")
    return index


def takes_prompts(model: str, revision: str | None) -> bool:
    """Whether a pipeline takes prompts; only its model_index.json is read.

    Raises:
        ModelError: there is no such model, or it is not a pipeline.
    """
    return read_index(model, revision).class_name not in UNCONDITIONAL


open_backbone.__signature__ = inspect.signature(PipelineOptions)  # type: ignore[attr-defined]  # one list of options
