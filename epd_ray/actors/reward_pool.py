"""Reward actors and their pools, and the heads that score in the driver."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from epd_ray.actors.cluster import BrokenGpuError, Resources, end_if_broken, resources
from epd_ray.actors.environments import runtime_env
from epd_ray.actors.pool import DEAD, Bounds, Call, Pool, last_line
from epd_ray.actors.waiting import FIRST, Watch
from epd_ray.embedded.models import EMBEDDED
from epd_ray.errors import EpdRayError, ModelError, is_own_bug
from epd_ray.rewards import HEADS, SERVERS
from epd_ray.rewards.needs import needs_of
from epd_ray.rewards.routes import Routes
from epd_ray.rewards.scoring import Scorer
from epd_ray.telemetry.memory import Memory, peak_memory
from epd_ray.types import FloatArray, ImageArray, Metadata
from epd_ray.weights.devices import one_thread

RESTART_SECONDS = 300.0  # in which a new process must take the place of one that died
POLL_SECONDS = 0.2
ATTEMPTS = 3  # processes of an actor that may die over the same call
NO_IMAGES = np.empty((0, 3, 0, 0), np.uint8)  # in place of a batch that a head does not judge
CALLS_PER_ACTOR = 2  # the images of the second call arrive while those of the first are scored
LOST = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError)


@dataclass(frozen=True)
class RewardSpec:
    """A reward head, and the actors that run it.

    Attributes:
        head: a name in the registry, or "module:Class".
        target: the "module:Class" that runs in place of the head, where it runs in a published package; else None.
        options: the keyword arguments of the head.
        weight: the weight of the head in the reward, relative to the other heads.
        replicas: the number of actors at the start; with 0 the driver scores.
        min_replicas: the smallest number of actors, while few images wait; None for `replicas`.
        max_replicas: the largest number of actors, while many images wait; None for `replicas`.
        num_cpus: the CPUs of each actor.
        num_gpus: the GPUs of each actor, also a share of one.
        resources: the custom resources of each actor.
        python: the interpreter of the environment of the head (see environments); None for that of the driver.
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
    def needs(self) -> tuple[str, ...]:
        """The columns of a prompt's row that the head reads; the published packages read none."""
        return needs_of(self.head, self.options) if self.target is None else ()

    @property
    def bundle(self) -> Resources:
        """The resources that one actor asks for."""
        return resources(self.num_cpus, self.num_gpus, self.resources)


def wants_gpu(head: str, options: Mapping[str, Any]) -> bool:
    """Whether a head could use a GPU, because its model is neither embedded nor on another machine."""
    return head not in (*SERVERS, "simulated") and options.get("model") not in EMBEDDED


@dataclass(frozen=True)
class TimedScores:
    """The scores of a batch by one head.

    Attributes:
        values: raw scores, [B]; NaN where the head does not judge the row.
        seconds: how long they took.
        memory: the peak memory of the process so far.
        costs: what they cost by name, such as prompt_tokens, where the head counts that.
    """

    values: FloatArray
    seconds: float
    memory: Memory
    costs: Mapping[str, int] = field(default_factory=dict)


class RewardActor:
    """A Scorer in an actor or in the driver.

    It builds the head at the first call and not in its constructor, whose errors Ray would wrap.

    Args:
        name: the name of the head in this run.
        head: the name of the head in the registry, or "module:Class".
        options: the keyword arguments of the head.
    """

    def __init__(self, name: str, head: str, options: Mapping[str, Any]) -> None:
        self._name, self._head, self._options = name, head, options
        self._scorer: Scorer | None = None

    def __repr__(self) -> str:  # Ray's dashboard and logs show this
        return f"reward {self._name}"

    def ready(self) -> None:
        """Build the head, if it is not built yet.

        Raises:
            EpdRayError: the head cannot be built.
        """
        self._built()

    def _built(self) -> Scorer:
        if self._scorer is None:
            try:
                self._scorer = Scorer(self._name, HEADS.build(self._head, self._options))
            except EpdRayError:
                raise
            except Exception as error:  # a class of the user may raise anything, and the user sees its message
                if is_own_bug(error):
                    raise
                why = f"{type(error).__name__}: {error}"
                raise ModelError(f"reward head {self._name!r} cannot be built: {why}") from None
        return self._scorer

    def score(
        self,
        images: ImageArray,
        prompts: Sequence[str],
        rollout_ids: Sequence[str],
        rows: Sequence[Metadata | None] | None = None,
    ) -> TimedScores:
        """See Scorer.score."""
        with end_if_broken():
            scorer = self._built()
            start, before = time.perf_counter(), scorer.costs
            values = scorer.score(images, prompts, rollout_ids, rows)
        costs = {name: count - before[name] for name, count in scorer.costs.items()}
        return TimedScores(values, time.perf_counter() - start, peak_memory(), costs)

    def model_id(self) -> str:
        """The name of the head's model."""
        return self._built().head.model_id


class RewardPool:
    """A pool of actors per head. Heads without replicas score in this process.

    Args:
        specs: the name of each head in this run -> its spec.
        tag: a text that makes the names of the actors unique on the cluster.
        timeout_s: see Pool.
        routes: which heads judge each prompt, and which columns of its row they read; None where all judge all of them
            and read none.
    """

    def __init__(
        self,
        specs: Mapping[str, RewardSpec],
        tag: str,
        timeout_s: float | None = None,
        routes: Routes | None = None,
    ) -> None:
        self._routes = routes
        self.specs, self._tag, self._made, self._timeout_s = dict(specs), tag, 0, timeout_s
        self.pools = {name: self._pool(name, spec) for name, spec in self.specs.items() if spec.replicas}
        self._here = {
            name: RewardActor(name, spec.target or spec.head, spec.options)
            for name, spec in self.specs.items()
            if not spec.replicas
        }

    def _pool(self, name: str, spec: RewardSpec) -> Pool:
        low, high = spec.min_replicas or spec.replicas, spec.max_replicas or spec.replicas
        if ray.util.get_current_placement_group() is not None:  # the resources of a Tune trial are fixed
            low = high = spec.replicas
        start = [self._make(name) for _ in range(spec.replicas)]
        bounds = Bounds(low, max(high, spec.replicas), CALLS_PER_ACTOR)
        what, make = f"reward head {name!r}", partial(self._make, name)
        return Pool(what, start, make, _load, bounds, CALLS_PER_ACTOR, self._timeout_s)

    def _make(self, name: str) -> tuple[int, ActorHandle[RewardActor]]:
        spec = self.specs[name]
        self._made += 1
        asked = {"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus, "resources": dict(spec.resources)}
        # Ray must not repeat a call whose process died, because it would do so for ever.
        lasting = {"name": f"reward:{name}:{self._tag}:{self._made}", "max_restarts": -1, "max_task_retries": 0}
        return self._made, start_head(name, spec, {**asked, **lasting})

    def wait_ready(self) -> None:
        """Block until every head is loaded.

        Raises:
            EpdRayError: a head cannot be loaded, or its processes died or gave no answer while loading it.
        """
        first_s = None if self._timeout_s is None else FIRST * self._timeout_s
        everyone = [(name, actor) for name, pool in self.pools.items() for actor in pool.actors]
        for _, actor in everyone:
            actor.ready.remote().future()  # all load at once; with a future Ray does not log unfetched errors
        for head in self._here.values():
            one_thread()  # as in an actor, because the last bits depend on the number of threads
            head.ready()
        for name, actor in everyone:
            insist(actor, f"reward head {name!r}", "loading", actor.ready.remote, first_s)

    def score(
        self, key: str, images: "ray.ObjectRef[ImageArray]", prompts: Sequence[str], rollout_ids: Sequence[str]
    ) -> dict[str, Call]:
        """Queue one call per head that has actors; the images stay in the object store until an actor fetches them.

        Args:
            key: the key of the calls.
            images: [B, 3, H, W], uint8, in the object store.
            prompts: the prompt of each image.
            rollout_ids: the rollout id of each image, for messages.
        """
        batch = partial(_Batch, images, tuple(prompts), tuple(rollout_ids))
        calls = {name: Call(key, _scores(name, batch(self._given(name, prompts)))) for name in self.pools}
        for name, call in calls.items():
            self.pools[name].submit(call)
        return calls

    def score_here(
        self, images: "ray.ObjectRef[ImageArray]", prompts: Sequence[str], rollout_ids: Sequence[str]
    ) -> dict[str, TimedScores]:
        """Score with the heads in this process, and return when they are done; the arguments are those of `score`.

        Raises:
            RewardError: a score is not valid.
            RayError: the images are lost.
        """
        if not self._here:
            return {}
        opened = ray.get(images)
        return {
            name: head.score(opened, prompts, rollout_ids, self._given(name, prompts))
            for name, head in self._here.items()
        }

    def _given(self, name: str, prompts: Sequence[str]) -> list[Metadata | None] | None:
        return None if self._routes is None else self._routes.given(name, prompts)

    @property
    def actors(self) -> list[ActorHandle[RewardActor]]:
        """The handles of all reward actors."""
        return [actor for pool in self.pools.values() for actor in pool.actors]

    def stop(self) -> None:
        """End all reward actors."""
        for pool in self.pools.values():
            pool.stop()


@dataclass(frozen=True)
class _Batch:
    """The arguments of RewardActor.score."""

    images: "ray.ObjectRef[ImageArray]"
    prompts: Sequence[str]
    rollout_ids: Sequence[str]
    rows: Sequence[Metadata | None] | None


def _scores(name: str, batch: _Batch) -> "Callable[[ActorHandle[RewardActor]], ray.ObjectRef[TimedScores]]":
    judged = batch.rows is None or any(row is not None for row in batch.rows)
    images = batch.images if judged else NO_IMAGES  # which need not travel to an actor that does not look at them
    arguments = (images, batch.prompts, batch.rollout_ids, batch.rows)
    return lambda actor: actor.score.options(name=f"score {name}").remote(*arguments)


def _load(actor: ActorHandle[RewardActor]) -> "ray.ObjectRef[Any]":
    return actor.ready.remote()


def start_head(name: str, spec: RewardSpec, options: Mapping[str, Any]) -> ActorHandle[RewardActor]:
    """Start an actor of a head, in the environment of the head if it has one.

    Args:
        name: the name of the head in this run.
        spec: the spec of the head; the resources of the actor come from `options` instead.
        options: the options of Ray for the actor.
    """
    own = {} if spec.python is None else {"runtime_env": runtime_env(spec.python)}
    actor = ray.remote(RewardActor).options(**options, **own)
    return actor.remote(name, spec.target or spec.head, dict(spec.options))


def insist(
    actor: ActorHandle[Any],
    what: str,
    doing: str,
    ask: "Callable[[], ray.ObjectRef[Any]]",
    timeout_s: float | None = None,
) -> Any:
    """Call an actor, and repeat the call with its next process where one dies over it, hangs or has a CUDA error.

    Args:
        actor: an actor that restarts, and whose constructor loads nothing.
        what: the name of the actor in messages.
        doing: the name of the work in messages, such as "loading".
        ask: makes the call.
        timeout_s: the seconds without an answer after which a process is ended; None for no bound.

    Returns:
        The answer of the actor.

    Raises:
        ModelError: the actor cannot start, does not restart, or ATTEMPTS of its processes died, hung or had a CUDA
            error.
        BaseException: the call raised an error, which is raised here as it is.
    """
    why = f"its process died {ATTEMPTS} times while {doing}: out of memory?"
    for _ in range(ATTEMPTS):
        try:
            with Watch(f"{what} ({doing})", actor, timeout_s) as watch:
                return ray.get(ask())
        except ray.exceptions.RayTaskError as error:
            cause = unwrap(error)
            if not isinstance(cause, BrokenGpuError):
                raise cause from None
            why = f"{cause} (while {doing})"  # the next call ends the process
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise ModelError(f"{what}: its environment cannot be set up: {last_line(error)}") from None
        except LOST:
            if watch.late:
                guess = "does it hang, or is cluster.task_timeout_s too short?"
                why = f"its process gave no answer in {timeout_s:g} s while {doing}: {guess}"
            gone = _why_gone(actor)
            if gone is not None:
                raise ModelError(f"{what}: its process died while {doing} and does not restart: {gone}") from None
    raise ModelError(f"{what}: {why}")


def _why_gone(actor: ActorHandle[Any]) -> str | None:
    """Wait until an actor has restarted, and return None; else return why it does not."""
    end = time.monotonic() + RESTART_SECONDS
    while time.monotonic() < end:
        try:
            ray.get(actor.__ray_ready__.remote())
            return None
        except ray.exceptions.ActorUnavailableError:
            time.sleep(POLL_SECONDS)  # while it restarts, calls fail at once
        except (*DEAD, ray.exceptions.RuntimeEnvSetupError) as error:
            return last_line(error)
    return f"no new process started within {RESTART_SECONDS:.0f} s"


def unwrap(error: ray.exceptions.RayTaskError) -> BaseException:
    """The exception that the actor raised, from the error in which Ray wraps it."""
    cause: BaseException = error.cause if error.cause is not None else error
    return cause
