"""Open a diffusers pipeline by directory or hub id; its model_index.json says which family it belongs to."""

import inspect
from dataclasses import replace
from typing import Any

from epd_ray.backbones.driver import DrivenBackbone, open_driven
from epd_ray.backbones.index import FAMILIES, UNCONDITIONAL, supported_index
from epd_ray.backbones.loading import PipelineOptions, open_pipeline
from epd_ray.backbones.pipeline import Family, PipelineBackbone


def open_backbone(**options: Any) -> PipelineBackbone | DrivenBackbone:
    """Open a pipeline as a backbone: by the adapter for its class, or else through its own call.

    An adapter evaluates the points of an interval in one batch and keeps the embeddings of prompts.

    Args:
        options: the fields of PipelineOptions.

    Raises:
        ModelError: the model is missing, damaged, gated, or of a kind that is not supported; or an option has a value
            that it cannot have.
        ConfigError: the device or dtype is not available.
    """
    opened = PipelineOptions(**options)
    index = supported_index(opened.model, opened.revision)
    if index.class_name not in FAMILIES.names():
        return open_driven(**options)
    if opened.dtype == "auto" and index.class_name in UNCONDITIONAL:
        opened = replace(opened, dtype="float32")  # small networks, judged by statistics that are sensitive to rounding
    denoiser = "transformer" if "transformer" in index.components else "unet"
    pipeline = open_pipeline(index, opened, denoiser)
    family: Family = FAMILIES.build(index.class_name, {"pipeline": pipeline, "options": opened})
    return PipelineBackbone(pipeline, family, opened, index.commit, index.fingerprint)


open_backbone.__signature__ = inspect.signature(PipelineOptions)  # type: ignore[attr-defined]  # one list of options
