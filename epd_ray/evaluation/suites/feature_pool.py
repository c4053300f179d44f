"""Feature extractors in actors, in an environment of their own where they need one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle
from types import TracebackType
from typing import Any

import numpy as np
import ray

from epd_ray.actors.cluster import (
    PLACEMENT_SECONDS,
    BrokenGpuError,
    end_if_broken,
    require_room,
    resources,
    warn_of_idle_gpus,
)
from epd_ray.actors.environments import EXTRACTORS as ENVIRONMENTS
from epd_ray.actors.environments import interpreter, runtime_env
from epd_ray.actors.reward_pool import LOST, insist, unwrap
from epd_ray.embedded.models import EMBEDDED
from epd_ray.errors import EpdRayError, ModelError, is_own_bug
from epd_ray.evaluation.metrics import EXTRACTORS
from epd_ray.types import FeatureExtractor, FloatArray, ImageArray

BATCH = 32  # pictures of a call, whatever the number of actors: features depend on it in their last bits
RETRIES = 2  # of a call whose process died, or broke its GPU, with which it dies at the next try


@dataclass(frozen=True)
class FeatureSpec:
    """An extractor, and the actors that run it.

    Attributes:
        extractor: a name in the registry (clip, inception), or "module:Class".
        options: its keyword arguments.
        replicas: number of actors.
        num_cpus: per actor.
        num_gpus: per actor.
        resources: custom resources per actor.
    """

    extractor: str = "clip"
    options: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """Which features these are."""

    model_id: str
    revision: str
    dimension: int


class FeatureActor:
    """An extractor in its own process; built when first asked for, so that errors travel whole."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name, self._options = name, options
        self._extractor: FeatureExtractor | None = None

    def __repr__(self) -> str:  # what Ray's dashboard and logs call it
        return f"features {self._name}"

    def _built(self) -> FeatureExtractor:
        if self._extractor is None:
            try:
                self._extractor = EXTRACTORS.build(self._name, self._options)
            except EpdRayError:
                raise
            except Exception as error:  # anybody's class may stand here; its own words go to the user
                if is_own_bug(error):
                    raise
                why = f"{type(error).__name__}: {error}"
                raise ModelError(f"feature extractor {self._name!r} cannot be built: {why}") from None
        return self._extractor

    def describe(self) -> Description:
        """Build the extractor, once, and say what it is."""
        built = self._built()
        return Description(built.model_id, built.revision, built.dimension)

    def features(self, images: ImageArray) -> FloatArray:
        """Features [B, D] of images [B, 3, H, W], uint8."""
        with end_if_broken():
            return self._built().features(images)


class FeaturePool:
    """Some actors that together are a FeatureExtractor.

    Args:
        spec: what runs, and on how many actors.
        timeout_s: for room to turn up.

    Attributes:
        model_id, revision, dimension: the extractor's.

    Raises:
        EpdRayError: the extractor's own error, or why its actors cannot start.
        EnvironmentFailure: the environment that it needs is not built on this machine.
        PlacementError: no room for the actors.
    """

    def __init__(self, spec: FeatureSpec, timeout_s: float = PLACEMENT_SECONDS) -> None:
        environment = ENVIRONMENTS.get(spec.extractor)
        own = {} if environment is None else {"runtime_env": runtime_env(str(interpreter(environment)))}
        self._what = f"feature extractor {spec.extractor!r}"
        if spec.options.get("model") not in EMBEDDED:
            warn_of_idle_gpus({"cluster.feature_gpus": spec.num_gpus})
        bundle = resources(spec.num_cpus, spec.num_gpus, spec.resources)
        require_room({self._what: [bundle] * spec.replicas}, timeout_s)
        remote = ray.remote(FeatureActor).options(
            num_cpus=spec.num_cpus,
            num_gpus=spec.num_gpus,
            resources=dict(spec.resources),
            max_restarts=-1,
            max_task_retries=RETRIES,
            **own,
        )
        self._actors = [remote.remote(spec.extractor, dict(spec.options)) for _ in range(spec.replicas)]
        try:
            said = [insist(actor, self._what, "loading", actor.describe.remote) for actor in self._actors]
        except BaseException:
            self.stop()
            raise
        self.model_id, self.revision, self.dimension = said[0].model_id, said[0].revision, said[0].dimension

    def features(self, images: ImageArray) -> FloatArray:
        """Features [B, D] of images [B, 3, H, W], uint8; their order is the images'.

        Raises:
            EpdRayError: the extractor's own error.
            ModelError: its processes died over the pictures.
        """
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        calls = [
            actor.features.options(retry_exceptions=[BrokenGpuError]).remote(ray.put(batch))
            for actor, batch in zip(cycle(self._actors), batches, strict=False)
        ]
        try:
            found = ray.get(calls)
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from None
        except LOST as error:
            raise ModelError(f"{self._what}: its process died {RETRIES + 1} times over pictures: {error}") from None
        return np.concatenate([np.empty((0, self.dimension), np.float32), *found])

    def stop(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)

    def __enter__(self) -> "FeaturePool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
