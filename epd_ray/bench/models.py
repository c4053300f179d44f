"""The models that a case can measure: the embedded one, or a published architecture with random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from epd_ray.actors.reward_pool import RewardSpec
from epd_ray.actors.tasks import BackboneSpec
from epd_ray.backbones.architectures import ARCHITECTURES
from epd_ray.bench.random_models import Size
from epd_ray.bench.settings import DEFAULTS
from epd_ray.embedded.scenes import Scene, distinct_scenes
from epd_ray.errors import ConfigError
from epd_ray.rdpo.config import EMBEDDED_BACKBONE
from epd_ray.registry import did_you_mean
from epd_ray.rewards import HEADS
from epd_ray.rewards.scoring import Scorer
from epd_ray.types import Backbone

EMBEDDED, RANDOM = "shapes", "-random"
RANDOM_MODELS = tuple(f"{name}{RANDOM}" for name in ARCHITECTURES)
MODELS = (EMBEDDED, *RANDOM_MODELS)
FACTORY = "epd_ray.bench.random_models:random_backbone"


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    Attributes:
        model: one of MODELS.
        size: "full" or "small" for a random model; None means full on a GPU and small on a CPU.
        resolution: pixels per side of a random model's pictures; None means the default of `random_backbone`.
        dtype: precision of a random model's network.
        compile: whether a random model's network is compiled with torch.compile.

    Raises:
        ConfigError: the model is unknown, or it is the embedded one, which has no size and is not compiled.
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
        """How a rollout actor opens the model."""
        if self.model == EMBEDDED:
            return EMBEDDED_BACKBONE
        return BackboneSpec(FACTORY, self._arguments)

    @property
    def overrides(self) -> list[str]:
        """The model as overrides of a run's configuration. On a machine with a GPU the actors share that GPU."""
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
        """The loaded model, and the guidance scale that it is used with."""
        backbone, scale = self.spec.open(), self.spec.guidance_scale
        return backbone, backbone.default_guidance if scale is None else scale

    @property
    def facts(self) -> dict[str, str | bool]:
        """What a record says about the model and the device that it runs on."""
        if self.model == EMBEDDED:
            return {"model": self.model, "device": device_name()}
        return {"model": self.model, "size": self._arguments["size"], "compile": self.compile, "device": device_name()}

    @property
    def full(self) -> bool:
        """Whether the network has its published size, so that one picture takes seconds."""
        return self.facts.get("size") == "full"


DEFAULT_SUBJECT = Subject()


def device_name() -> str:
    """The name of the GPU that models run on, as torch gives it, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def scenes(count: int) -> list[Scene]:
    """This many different training scenes of the embedded model, as the default run has them."""
    return distinct_scenes("train", count, DEFAULTS.seed, DEFAULTS.prompts.two_things)


def prompts(count: int) -> list[str]:
    """This many different prompts, the captions of scenes."""
    return [scene.caption for scene in scenes(count)]


def scorers(specs: Mapping[str, RewardSpec]) -> list[Scorer]:
    """The reward heads of a run, in this process."""
    return [Scorer(name, HEADS.build(spec.head, spec.options)) for name, spec in specs.items()]
