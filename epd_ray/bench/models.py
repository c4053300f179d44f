"""The models that a measurement can run on: the embedded one, or a published architecture with random weights."""

from dataclasses import dataclass
from typing import Any

import torch

from epd_ray.actors.tasks import BackboneSpec
from epd_ray.backbones.architectures import ARCHITECTURES
from epd_ray.bench.random_models import Size
from epd_ray.embedded.scenes import distinct_scenes
from epd_ray.errors import ConfigError
from epd_ray.rdpo.config import EMBEDDED_BACKBONE
from epd_ray.registry import did_you_mean
from epd_ray.types import Backbone

EMBEDDED, RANDOM = "shapes", "-random"
MODELS = (EMBEDDED, *(f"{name}{RANDOM}" for name in ARCHITECTURES))
FACTORY = "epd_ray.bench.random_models:random_backbone"


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: one of MODELS.
        size: of a random model: "full" or "small"; None: full on a GPU.
        resolution: of a random model, pixels per side; None: see random_backbone.
        dtype: of a random model.
        compile: a random model's network, see PipelineOptions.

    Raises:
        ConfigError: another model, or the embedded one compiled or with a size.
    """

    model: str = EMBEDDED
    size: Size | None = None
    resolution: int | None = None
    dtype: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError([f"unknown model {self.model!r}{did_you_mean(self.model, MODELS)}"])
        for wrong, said in ((self.compile, "is not compiled"), (self.size, f"has no size {self.size!r}")):
            if wrong and self.model == EMBEDDED:
                raise ConfigError([f"model {EMBEDDED} {said}: give a random model, such as sd3{RANDOM}"])

    @property
    def spec(self) -> BackboneSpec:
        """How a worker opens it."""
        if self.model == EMBEDDED:
            return EMBEDDED_BACKBONE
        return BackboneSpec(FACTORY, self._arguments)

    @property
    def overrides(self) -> list[str]:
        """The same as configuration overrides of a run; on a GPU its actors share that."""
        found = []
        if self.model != EMBEDDED:
            options = ", ".join(f"{name}: {value}" for name, value in self._arguments.items())
            found += [f"backbone.family={FACTORY}", f"backbone.options={{{options}}}", "backbone.guidance_scale=null"]
        if torch.cuda.is_available():
            found += ["cluster.rollout_actors=1", "cluster.rollout_gpus=0.6", "rewards.clip.num_gpus=0.2"]
        return found

    @property
    def _arguments(self) -> dict[str, Any]:
        size = self.size or ("full" if torch.cuda.is_available() else "small")
        sized = {} if self.resolution is None else {"resolution": self.resolution}
        compiled = {"compile": True} if self.compile else {}
        return {"name": self.model.removesuffix(RANDOM), "size": size, "dtype": self.dtype, **sized, **compiled}

    def open(self) -> tuple[Backbone, float]:
        """The model, and the guidance scale that it is used with."""
        backbone, scale = self.spec.open(), self.spec.guidance_scale
        return backbone, backbone.default_guidance if scale is None else scale

    @property
    def facts(self) -> dict[str, str | bool]:
        """For the record."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        if self.model == EMBEDDED:
            return {"model": self.model, "device": device}
        return {"model": self.model, "size": self._arguments["size"], "compile": self.compile, "device": device}

    @property
    def full(self) -> bool:
        """Whether it is a published network, of which one picture takes seconds."""
        return self.facts.get("size") == "full"


def prompts(count: int) -> list[str]:
    """So many scenes to draw."""
    return [scene.caption for scene in distinct_scenes("train", count, 0, 0.5)]
