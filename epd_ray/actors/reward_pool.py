"""Ray around the plain workers: reward actors and their pools; or the heads in the driver, where that scores."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from epd_ray.actors.cluster import BrokenGpuError, Resources, end_if_broken, resources
from epd_ray.actors.environments import runtime_env
from epd_ray.actors.pool import DEAD, TASK_SECONDS, Bounds, Call, Pool, last_line
from epd_ray.embedded.models import EMBEDDED
from epd_ray.errors import EpdRayError, ModelError, is_own_bug
from epd_ray.rewards import HEADS
from epd_ray.rewards.scoring import Scorer
from epd_ray.telemetry.memory import Memory, peak_memory
from epd_ray.types import FloatArray, ImageArray
from epd_ray.weights.devices import one_thread

RESTART_SECONDS = 300.0  # for a process to take the place of one that died
POLL_SECONDS = 0.2
ATTEMPTS = 3  # processes that may die over the same work
CALLS_PER_ACTOR = 2  # images of the second travel while the first is scored
LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError)


@dataclass(frozen=True)
class RewardSpec:
    """One head of the mix, and the actors that run it.

    Attributes:
        head: a name in the registry, or "module:Class".
        target: the "module:Class" that runs in its place, where a published package does the head's work.
        options: the head's keyword arguments.
        weight: share in the mix, relative to the other heads.
        replicas: number of actors at the start; 0: the driver scores, without an actor.
        min_replicas: they may become this few while little waits to be scored; None: as many as at the start.
        max_replicas: they may become this many while much does; None: as many as at the start.
        num_cpus: per actor.
        num_gpus: per actor.
        resources: custom resources per actor.
        python: interpreter of an environment of its own (see environments); None for the driver's.
    """

    head: str = "clip"
    target: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    replicas: int = 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    num_cpus: float = 0.25
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    python: str | None = None

    @property
    def bundle(self) -> Resources:
        """What one actor asks for."""
        return resources(self.num_cpus, self.num_gpus, self.resources)


def wants_gpu(head: str, options: Mapping[str, Any]) -> bool:
    """Whether a head's model is one for a GPU: neither embedded, nor on another machine."""
    return head not in ("http", "simulated") and options.get("model") not in EMBEDDED


@dataclass(frozen=True)
class TimedScores:
    """Raw scores [B], the seconds they took, and the actor's peak memory so far."""

    values: FloatArray
    seconds: float
    memory: Memory


class RewardActor:
    """A Scorer for a process of its own, or for the driver.

    It is built when first asked for, so that errors travel whole and deaths of its process are counted.
    """

    def __init__(self, name: str, head: str, options: Mapping[str, Any]) -> None:
        self._name, self._head, self._options = name, head, options
        self._scorer: Scorer | None = None

    def __repr__(self) -> str:  # what Ray's dashboard and logs call it
        return f"reward {self._name}"

    def ready(self) -> None:
        """Build the head, once.

        Raises:
            EpdRayError: what keeps it from being built.
        """
        self._built()

    def _built(self) -> Scorer:
        if self._scorer is None:
            try:
                self._scorer = Scorer(self._name, HEADS.build(self._head, self._options))
            except EpdRayError:
                raise
            except Exception as error:  # anybody's class may stand here; its own words go to the user
                if is_own_bug(error):
                    raise
                why = f"{type(error).__name__}: {error}"
                raise ModelError(f"reward head {self._name!r} cannot be built: {why}") from None
        return self._scorer

    def score(self, images: ImageArray, prompts: Sequence[str], rollout_ids: Sequence[str]) -> TimedScores:
        """See Scorer.score."""
        with end_if_broken():
            scorer = self._built()
            start = time.perf_counter()
            values = scorer.score(images, prompts, rollout_ids)
        return TimedScores(values, time.perf_counter() - start, peak_memory())

    def model_id(self) -> str:
        """What the head's model is called."""
        return self._built().head.model_id


class RewardPool:
    """An elastic pool of restartable actors per head; heads without replicas are in this process.

    Args:
        specs: head name in this run -> its spec.
        tag: makes actor names unique on the cluster.
        timeout_s: see Pool.
    """

    def __init__(self, specs: Mapping[str, RewardSpec], tag: str, timeout_s: float | None = TASK_SECONDS) -> None:
        self.specs, self._tag, self._made, self._timeout_s = dict(specs), tag, 0, timeout_s
        self.pools = {name: self._pool(name, spec) for name, spec in self.specs.items() if spec.replicas}
        self._here = {
            name: RewardActor(name, spec.target or spec.head, spec.options)
            for name, spec in self.specs.items()
            if not spec.replicas
        }

    def _pool(self, name: str, spec: RewardSpec) -> Pool:
        low, high = spec.min_replicas or spec.replicas, spec.max_replicas or spec.replicas
        if ray.util.get_current_placement_group() is not None:  # a trial, whose room is fixed
            low = high = spec.replicas
        start = [self._make(name) for _ in range(spec.replicas)]
        bounds = Bounds(low, max(high, spec.replicas), CALLS_PER_ACTOR)
        what, make = f"reward head {name!r}", partial(self._make, name)
        return Pool(what, start, make, _load, bounds, CALLS_PER_ACTOR, self._timeout_s)

    def _make(self, name: str) -> tuple[int, ActorHandle[RewardActor]]:
        spec = self.specs[name]
        self._made += 1
        asked = {"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus, "resources": dict(spec.resources)}
        # A call that its process died over is not repeated by Ray, which would do so for ever.
        lasting = {"name": f"reward:{name}:{self._tag}:{self._made}", "max_restarts": -1, "max_task_retries": 0}
        return self._made, start_head(name, spec, {**asked, **lasting})

    def wait_ready(self) -> None:
        """Block until every head is loaded.

        Raises:
            EpdRayError: the head's own error, or that its processes died over it.
        """
        everyone = [(name, actor) for name, pool in self.pools.items() for actor in pool.actors]
        for _, actor in everyone:
            actor.ready.remote().future()  # all load at once; Ray would complain of errors that nobody takes
        for head in self._here.values():
            one_thread()  # as in an actor: the last bits depend on it
            head.ready()
        for name, actor in everyone:
            insist(actor, f"reward head {name!r}", "loading", actor.ready.remote)

    def score(
        self, key: str, images: "ray.ObjectRef[ImageArray]", prompts: Sequence[str], rollout_ids: Sequence[str]
    ) -> dict[str, Call]:
        """One call per head, on images that stay where they are until an actor opens them."""
        calls = {name: Call(key, _scores(name, images, prompts, rollout_ids)) for name in self.pools}
        for name, call in calls.items():
            self.pools[name].submit(call)
        return calls

    def score_here(
        self, images: "ray.ObjectRef[ImageArray]", prompts: Sequence[str], rollout_ids: Sequence[str]
    ) -> dict[str, TimedScores]:
        """What the heads in this process say, now.

        Raises:
            RewardError: an answer that is no reward.
            RayError: the images are lost.
        """
        if not self._here:
            return {}
        opened = ray.get(images)
        return {name: head.score(opened, prompts, rollout_ids) for name, head in self._here.items()}

    @property
    def actors(self) -> list[ActorHandle[RewardActor]]:
        """All of them."""
        return [actor for pool in self.pools.values() for actor in pool.actors]

    def stop(self) -> None:
        """End the actors of this pool."""
        for pool in self.pools.values():
            pool.stop()


def _scores(
    name: str, images: "ray.ObjectRef[ImageArray]", prompts: Sequence[str], rollout_ids: Sequence[str]
) -> "Callable[[ActorHandle[RewardActor]], ray.ObjectRef[TimedScores]]":
    return lambda actor: actor.score.options(name=f"score {name}").remote(images, prompts, rollout_ids)


def _load(actor: ActorHandle[RewardActor]) -> "ray.ObjectRef[Any]":
    return actor.ready.remote()


def start_head(name: str, spec: RewardSpec, options: Mapping[str, Any]) -> ActorHandle[RewardActor]:
    """Start a head's actor, in its own environment where it has one.

    Args:
        name: of the head in this run.
        spec: of the head; what its actor asks for is in `options`.
        options: Ray's, of the actor.
    """
    own = {} if spec.python is None else {"runtime_env": runtime_env(spec.python)}
    actor = ray.remote(RewardActor).options(**options, **own)
    return actor.remote(name, spec.target or spec.head, dict(spec.options))


def insist(actor: ActorHandle[Any], what: str, doing: str, ask: "Callable[[], ray.ObjectRef[Any]]") -> Any:
    """An actor's answer, asked for again of the next process when one dies over it, or breaks its GPU.

    Args:
        actor: that may restart, and whose constructor does nothing heavy.
        what: the actor, for people.
        doing: what it is asked for, for people.
        ask: makes the call.

    Raises:
        ModelError: the actor cannot start, no process took the place of one that died, or ATTEMPTS of them died or
            broke their GPUs.
        BaseException: what the actor raised.
    """
    why = f"its process died {ATTEMPTS} times while {doing}: out of memory?"
    for _ in range(ATTEMPTS):
        try:
            return ray.get(ask())
        except ray.exceptions.RayTaskError as error:
            cause = unwrap(error)
            if not isinstance(cause, BrokenGpuError):
                raise cause from None
            why = f"{cause} (while {doing})"  # the process ends with the next call
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise ModelError(f"{what}: its environment cannot be set up: {last_line(error)}") from None
        except LOST:
            gone = _why_gone(actor)
            if gone is not None:
                raise ModelError(f"{what}: its process died while {doing}, for good: {gone}") from None
    raise ModelError(f"{what}: {why}")


def _why_gone(actor: ActorHandle[Any]) -> str | None:
    """Wait until an actor that restarts is there again; else why it never will be."""
    end = time.monotonic() + RESTART_SECONDS
    while time.monotonic() < end:
        try:
            ray.get(actor.__ray_ready__.remote())
            return None
        except ray.exceptions.ActorUnavailableError:
            time.sleep(POLL_SECONDS)  # calls to one that restarts fail at once
        except (*DEAD, ray.exceptions.RuntimeEnvSetupError) as error:
            return last_line(error)
    return f"none took its place in {RESTART_SECONDS:.0f} s"


def unwrap(error: ray.exceptions.RayTaskError) -> BaseException:
    """The exception that the actor raised."""
    cause: BaseException = error.cause if error.cause is not None else error
    return cause
