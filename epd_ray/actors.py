"""Ray around the plain workers: reward actors, their pools, and whether there is room for all of it."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.actor import ActorHandle

from epd_ray.environments import runtime_env
from epd_ray.errors import EpdRayError, ModelError, PlacementError
from epd_ray.memory import Memory, peak_memory
from epd_ray.rewards import HEADS
from epd_ray.scoring import Scorer
from epd_ray.types import FloatArray, ImageArray

Resources = dict[str, float]
PLACEMENT_SECONDS = 30.0
ONE_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without it Ray listens on every interface
    "RAY_USAGE_STATS_ENABLED": "0",
}


HANDED_ON = ("HF_TOKEN", "HF_HOME")
"""Environment variables that actors get, unless the run says otherwise."""

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where `ray job submit` leaves its own runtime environment


def start_ray(address: str | None = None, env: Sequence[str] = HANDED_ON) -> None:
    """Join the cluster at `address` (or in RAY_ADDRESS, as submitted jobs have it); else start Ray on loopback.

    Args:
        address: of a cluster.
        env: names of environment variables; those that are set here reach every actor.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    for name in ("ray", "ray.rllib"):  # notices of migrations and missing extras, not of this run
        logging.getLogger(name).setLevel(logging.ERROR)
    if address is not None:
        ray.init(address=address, runtime_env={"env_vars": _variables(env)}, **quiet)
        return
    os.environ.update(ONE_MACHINE)
    # Actors import the package from where the driver has it, installed or not.
    here = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    several = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read the variable when it was imported, before it was set here
    try:
        ray.init(
            address="local",  # else Ray would join one that somebody else has started on this machine
            num_cpus=max(os.cpu_count() or 1, 2),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": {**_variables(env), "PYTHONPATH": paths}},
            **quiet,
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several


def _variables(names: Sequence[str]) -> dict[str, str]:
    """Those that are set, apart from what a submitted job has in its runtime environment (Ray refuses them twice)."""
    submitted = json.loads(os.environ.get(JOB_CONFIG) or "{}")
    there = (submitted.get("runtime_env") or {}).get("env_vars") or {}
    return {name: os.environ[name] for name in names if name in os.environ and name not in there}


@dataclass(frozen=True)
class RewardSpec:
    """One head of the mix, and the actors that run it.

    Attributes:
        head: a name in the registry, or "module:Class".
        target: the "module:Class" that runs in its place, where a published package does the head's work.
        options: the head's keyword arguments.
        weight: share in the mix, relative to the other heads.
        replicas: number of actors.
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
    num_cpus: float = 0.25
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    python: str | None = None

    @property
    def bundle(self) -> Resources:
        """What one actor asks for."""
        return resources(self.num_cpus, self.num_gpus, self.resources)


@dataclass(frozen=True)
class TimedScores:
    """Raw scores [B] and the seconds they took."""

    values: FloatArray
    seconds: float


class RewardActor:
    """A Scorer in its own process; a head that cannot be built is reported by `ready`, with its own error."""

    def __init__(self, name: str, head: str, options: Mapping[str, Any]) -> None:
        self._error: EpdRayError | None = None
        try:
            self._scorer = Scorer(name, HEADS.build(head, options))
        except EpdRayError as error:
            self._error = error
        except Exception as error:  # anybody's class may stand here; its own words go to the user
            self._error = ModelError(f"reward head {name!r} cannot be built: {type(error).__name__}: {error}")

    def ready(self) -> None:
        """Raise what kept the head from being built, if anything did."""
        if self._error is not None:
            raise self._error

    def score(self, images: ImageArray, prompts: Sequence[str], rollout_ids: Sequence[str]) -> TimedScores:
        """See Scorer.score."""
        self.ready()
        start = time.perf_counter()
        values = self._scorer.score(images, prompts, rollout_ids)
        return TimedScores(values, time.perf_counter() - start)

    def memory(self) -> Memory:
        """Peaks of this actor."""
        return peak_memory()


class RewardPool:
    """Restartable actors per head, used in turn; one that is gone for good is replaced.

    Args:
        specs: head name in this run -> its spec.
        tag: makes actor names unique on the cluster.
    """

    def __init__(self, specs: Mapping[str, RewardSpec], tag: str) -> None:
        self.specs, self._tag, self._made, self._turn = dict(specs), tag, 0, 0
        self._actors = {name: [self._make(name) for _ in range(s.replicas)] for name, s in self.specs.items()}

    def _make(self, name: str) -> ActorHandle[RewardActor]:
        spec = self.specs[name]
        self._made += 1
        options: dict[str, Any] = {
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "resources": dict(spec.resources),
        }
        if spec.python is not None:
            options["runtime_env"] = runtime_env(spec.python)
        return (
            ray.remote(RewardActor)
            .options(name=f"reward:{name}:{self._tag}:{self._made}", max_restarts=-1, max_task_retries=-1, **options)
            .remote(name, spec.target or spec.head, dict(spec.options))
        )

    def wait_ready(self) -> None:
        """Block until every head is loaded.

        Raises:
            EpdRayError: the head's own error.
        """
        try:
            ray.get([actor.ready.remote() for actors in self._actors.values() for actor in actors])
        except ray.exceptions.RayTaskError as error:
            raise unwrap(error) from None

    def score(
        self, images: "ray.ObjectRef[ImageArray]", prompts: Sequence[str], rollout_ids: Sequence[str]
    ) -> dict[str, "ray.ObjectRef[TimedScores]"]:
        """One call per head, on images that stay where they are until an actor opens them."""
        self._turn += 1
        chosen = {name: actors[self._turn % len(actors)] for name, actors in self._actors.items()}
        return {name: actor.score.remote(images, prompts, rollout_ids) for name, actor in chosen.items()}

    def memory(self) -> dict[str, Memory]:
        """Peaks of each head's first actor."""
        return {name: ray.get(actors[0].memory.remote()) for name, actors in self._actors.items()}

    def replace_dead(self) -> None:
        """Make new actors for those that no restart will bring back."""
        for name, actors in self._actors.items():
            for i, actor in enumerate(actors):
                try:
                    ray.get(actor.ready.remote(), timeout=1)
                except ray.exceptions.ActorDiedError:
                    actors[i] = self._make(name)
                except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                    continue  # busy or restarting: its queue is kept
                except ray.exceptions.RayTaskError as error:
                    raise unwrap(error) from None

    def stop(self) -> None:
        """End the actors of this pool."""
        for actors in self._actors.values():
            for actor in actors:
                ray.kill(actor)
        self._actors = {}


def unwrap(error: ray.exceptions.RayTaskError) -> BaseException:
    """The exception that the actor raised."""
    cause: BaseException = error.cause if error.cause is not None else error
    return cause


def resources(num_cpus: float, num_gpus: float, custom: Mapping[str, float]) -> Resources:
    """What an actor asks for, without what it does not need."""
    return {k: float(v) for k, v in {"CPU": num_cpus, "GPU": num_gpus, **custom}.items() if v}


def require_room(bundles: Mapping[str, Sequence[Resources]], timeout_s: float = PLACEMENT_SECONDS) -> None:
    """Check that all actors fit the cluster together, before any of them loads a model.

    Args:
        bundles: what is placed ("rollout actors") -> a bundle per actor.
        timeout_s: how long nodes may take to join.

    Raises:
        PlacementError: names the resource that is short and who asks for it.
    """
    wanted = [dict(b) for group in bundles.values() for b in group if b]
    if not wanted:
        return
    group = ray.util.placement_group(wanted, strategy="PACK")
    try:
        if not group.wait(timeout_s):
            raise PlacementError(_shortage(bundles, timeout_s))
    finally:
        ray.util.remove_placement_group(group)


def _shortage(bundles: Mapping[str, Sequence[Resources]], timeout_s: float) -> str:
    free = ray.available_resources()
    needs: Resources = {}
    for group in bundles.values():
        for bundle in group:
            for name, amount in bundle.items():
                needs[name] = needs.get(name, 0.0) + amount
    short = {n: a for n, a in needs.items() if a > free.get(n, 0.0) + 1e-9} or needs
    missing = ", ".join(f"{n}: {a:g} asked, {free.get(n, 0.0):g} free" for n, a in short.items())
    who = "; ".join(f"{kind}: {len(group)} x {dict(group[0])}" for kind, group in bundles.items() if group)
    fix = "ask for less under cluster and rewards, or add nodes"
    return f"no room for the actors after {timeout_s:.0f} s ({missing}): {fix} ({who})"
