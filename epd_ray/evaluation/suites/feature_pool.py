"""Feature extractors in Ray actors, which run in a Python environment of their own if the extractor needs one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from epd_ray.actors.cluster import BrokenGpuError, end_if_broken, require_room, resources, warn_of_idle_gpus
from epd_ray.actors.environments import EXTRACTORS as ENVIRONMENTS
from epd_ray.actors.environments import interpreter, runtime_env
from epd_ray.actors.reward_pool import LOST, insist, unwrap
from epd_ray.actors.waiting import FIRST, Watch
from epd_ray.embedded.models import EMBEDDED
from epd_ray.errors import EpdRayError, ModelError, is_own_bug
from epd_ray.evaluation.metrics import EXTRACTORS
from epd_ray.types import FeatureExtractor, FloatArray, ImageArray

if TYPE_CHECKING:  # the actors, which run in environments of their own, do without the configuration
    from epd_ray.config.services import ClusterConfig

BATCH = 32  # pictures in a call, whatever the number of actors, because the last bits of features depend on it
RETRIES = 2  # for a call whose process died or reported a broken GPU; with one, the process ends at the next try


@dataclass(frozen=True)
class FeatureSpec:
    """An extractor, and what the actors that run it reserve.

    Attributes:
        extractor: a registered name (clip, inception), or "module:Class".
        options: the keyword arguments of its constructor.
        replicas: the number of actors, at least 1.
        num_cpus: the CPU cores that each actor reserves.
        num_gpus: the GPUs that each actor reserves; 0 runs it on the CPU.
        resources: the custom Ray resources that each actor reserves, by name.
    """

    extractor: str = "clip"
    options: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """Which features an extractor computes.

    Attributes:
        model_id: the name of the model.
        revision: a checksum of its weights.
        dimension: the number of features of a picture.
    """

    model_id: str
    revision: str
    dimension: int


class FeatureActor:
    """An extractor in a process of its own, built at the first call, so that the caller gets its error as it is."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name, self._options = name, options
        self._extractor: FeatureExtractor | None = None

    def __repr__(self) -> str:  # the name in Ray's dashboard and logs
        return f"features {self._name}"

    def _built(self) -> FeatureExtractor:
        if self._extractor is None:
            try:
                self._extractor = EXTRACTORS.build(self._name, self._options)
            except EpdRayError:
                raise
            except Exception as error:  # a user's class may raise anything, and the user reads its message
                if is_own_bug(error):
                    raise
                why = f"{type(error).__name__}: {error}"
                raise ModelError(f"feature extractor {self._name!r} cannot be built: {why}") from None
        return self._extractor

    def describe(self) -> Description:
        """Build the extractor if it is not built yet, and describe it."""
        built = self._built()
        return Description(built.model_id, built.revision, built.dimension)

    def features(self, images: ImageArray) -> FloatArray:
        """Compute features [B, D], float32, of images [B, 3, H, W], uint8."""
        with end_if_broken():
            return self._built().features(images)


class FeaturePool:
    """Several actors that together are one FeatureExtractor.

    Args:
        spec: the extractor, and what its actors reserve.
        cluster: how long to wait for room and for answers.

    Attributes:
        model_id, revision, dimension: those of the extractor.

    Raises:
        EpdRayError: the extractor's own error, or the reason why its actors cannot start.
        EnvironmentFailure: the environment that the extractor needs is not built on this machine.
        PlacementError: the cluster has no room for the actors.
    """

    def __init__(self, spec: FeatureSpec, cluster: "ClusterConfig") -> None:
        environment = ENVIRONMENTS.get(spec.extractor)
        own = {} if environment is None else {"runtime_env": runtime_env(str(interpreter(environment)))}
        self._what = f"feature extractor {spec.extractor!r}"
        if spec.options.get("model") not in EMBEDDED:
            warn_of_idle_gpus({"cluster.feature_gpus": spec.num_gpus})
        bundle = resources(spec.num_cpus, spec.num_gpus, spec.resources)
        require_room({self._what: [bundle] * spec.replicas}, cluster.placement_timeout_s)
        remote = ray.remote(FeatureActor).options(
            num_cpus=spec.num_cpus,
            num_gpus=spec.num_gpus,
            resources=dict(spec.resources),
            max_restarts=-1,
            max_task_retries=RETRIES,
            **own,
        )
        self._actors = [remote.remote(spec.extractor, dict(spec.options)) for _ in range(spec.replicas)]
        self._timeout_s = cluster.task_timeout_s
        first_s = None if self._timeout_s is None else FIRST * self._timeout_s
        try:
            said = [insist(actor, self._what, "loading", actor.describe.remote, first_s) for actor in self._actors]
        except BaseException:
            self.stop()
            raise
        self.model_id, self.revision, self.dimension = said[0].model_id, said[0].revision, said[0].dimension

    def features(self, images: ImageArray) -> FloatArray:
        """Compute features [B, D], float32, of images [B, 3, H, W], uint8, in the order of the images.

        Raises:
            EpdRayError: the extractor's own error.
            ModelError: an actor's process died, or gave no answer in time, at every try.
        """
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        calls = [
            (actor, actor.features.options(retry_exceptions=[BrokenGpuError]).remote(ray.put(batch)))
            for actor, batch in zip(cycle(self._actors), batches, strict=False)
        ]
        found = [self._answer(actor, call, f"batch {i} of {len(calls)}") for i, (actor, call) in enumerate(calls, 1)]
        return np.concatenate([np.empty((0, self.dimension), np.float32), *found])

    def _answer(self, actor: Any, call: Any, which: str) -> FloatArray:
        """The features of a batch, which Ray gives to the next process of the actor where one dies or hangs."""
        try:
            with Watch(f"{self._what} ({which})", actor, self._timeout_s) as watch:
                found: FloatArray = ray.get(call)
                return found
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from None
        except LOST as error:
            how = "gave no answer in time" if watch.late else "died"
            raise ModelError(f"{self._what}: its process {how} {RETRIES + 1} times over {which}: {error}") from None

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
