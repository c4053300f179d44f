"""Which pipeline a model is, by its model_index.json alone, without torch, so that a wrong name is told at once."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epd_ray.embedded.models import resolve_model
from epd_ray.errors import ModelError, shown
from epd_ray.registry import Registry
from epd_ray.storage.documents import parse_json
from epd_ray.weights.hub import opening

if TYPE_CHECKING:
    from epd_ray.backbones.pipeline import Family

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
NEEDS_PICTURES = re.compile("Inpaint|Img2Img|ImageToVideo|VideoToVideo|ControlNet|Edit|Upscale|Refiner")
"""In the names of classes that no prompt alone is enough for; any other one shows it when it is opened."""

UNCONDITIONAL = ("DDIMPipeline", "DDPMPipeline", "LDMPipeline")

INDEX = "model_index.json"
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth"})  # suffixes that diffusers and the reward heads read
SAMPLES, SAMPLE = 64, 16 << 10  # places at which a large weight file is read for its fingerprint, and bytes at each


@dataclass(frozen=True)
class Index:
    """The contents of a model_index.json.

    Attributes:
        location: the directory or hub id that diffusers' from_pretrained takes.
        class_name: class of the pipeline.
        components: for each component of the class, whether the model has it.
        commit: commit of a hub repository; None for a directory.
        fingerprint: digits that identify a directory's weights and settings, see the function `fingerprint`; None for a
            hub repository.
    """

    location: str
    class_name: str
    components: dict[str, bool]
    commit: str | None
    fingerprint: str | None = None


def read_index(model: str, revision: str | None) -> Index:
    """Read which pipeline a model is, without its weights.

    Args:
        model: a pipeline directory, a hub id, or the name of an embedded model.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelError: there is no such model, or it is not a pipeline.
    """
    location = resolve_model(model)
    with opening(model):
        if Path(location).is_dir():
            path, commit = Path(location, INDEX), None
            if not path.is_file():
                raise ModelError(f"model {shown(model)} has no {INDEX}: give the directory of a diffusers pipeline")
            digits: str | None = fingerprint(path.parent)  # only now, because the folder may hold anything
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(location, INDEX, revision=revision))
            commit, digits = path.parent.name, None  # the cache keeps snapshots/<commit>/
        index = parse_json(path.read_bytes(), f"model {shown(model)}: {INDEX}", ModelError, "fetch the model again")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelError(f"model {shown(model)}: {INDEX} names no pipeline class: it is damaged")
    components = {k: v[0] is not None for k, v in index.items() if isinstance(v, list) and len(v) == 2}
    return Index(location, index["_class_name"], components, commit, digits)


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that identify the model in a folder.

    They depend on all of its .json files, such as a scheduler's shift or a tokenizer's words, and on samples of its
    weights, which are large and change everywhere in training. A weight file of up to 1 MiB is read whole, a larger one
    at its beginning, its end and 62 places between them.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in {".json", *WEIGHTS} and p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".json" or size <= SAMPLES * SAMPLE:
                digest.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek((size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def supported_index(model: str, revision: str | None) -> Index:
    """Read which pipeline a model is, see `read_index`.

    Raises:
        ModelError: there is no such model, it is not a pipeline, or it cannot draw from a prompt alone.
    """
    index = read_index(model, revision)
    if index.class_name not in FAMILIES.names() and NEEDS_PICTURES.search(index.class_name):
        raise unsupported(model, index.class_name, "needs more than a prompt")
    return index


def unsupported(model: str, class_name: str, why: str) -> ModelError:
    """The error for a pipeline class that cannot draw from a prompt alone."""
    known = ", ".join(FAMILIES.names())
    return ModelError(
        f"model {shown(model)} is a {class_name}, which {why}: supported are {known}, and all others that draw from a "
        "prompt alone"
    )


def takes_prompts(model: str, revision: str | None) -> bool:
    """Whether a pipeline takes prompts; only its model_index.json is read.

    Raises:
        ModelError: there is no such model, or it is not a pipeline.
    """
    return read_index(model, revision).class_name not in UNCONDITIONAL
