"""Ray itself: a local one or a cluster, what its processes are told, and whether there is room for the actors."""

import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray.actor import ActorHandle

import epd_ray
from epd_ray.errors import ClusterError, EpdRayError, PlacementError
from epd_ray.types import ImageArray

log = logging.getLogger(__name__)

Resources = dict[str, float]
PLACEMENT_SECONDS = 30.0
START_SECONDS = 600.0
LAST_WORDS_SECONDS = 1.0  # for the error to leave a process that ends with the next call, which may wait there already
HIDE_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Without it an actor that asks for no GPU sees them all, and Ray knows nothing of what it takes there."""
ONE_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without it Ray listens on every interface
    "RAY_USAGE_STATS_ENABLED": "0",
}

HANDED_ON = ("HF_TOKEN", "HF_HOME")
"""Environment variables that actors get, unless the run says otherwise."""

HOOK = "worker_process_setup_hook"
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where `ray job submit` leaves its own runtime environment

_broken = False  # an actor's GPU, for good


class BrokenGpuError(EpdRayError):
    """A CUDA error, from which its process never recovers; in the words of what it went wrong in, in one line."""


def start_ray(address: str | None = None, env: Sequence[str] = HANDED_ON, dashboard: bool = False) -> None:
    """Join the cluster at `address` (or in RAY_ADDRESS, as submitted jobs have it); else start Ray on loopback.

    No value goes into the runtime environment, which Ray writes into its logs for all to read: a local Ray's workers
    have the driver's own environment, and those of a cluster set the variables before anything else runs there.

    Args:
        address: of a cluster.
        env: names of environment variables; those that are set here reach every actor.
        dashboard: of a Ray that is started here, on loopback too.

    Raises:
        ClusterError: why the cluster cannot be joined, or that a local Ray does not start.
    """
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    for name in ("ray", "ray.rllib"):  # notices of migrations and missing extras, not of this run
        logging.getLogger(name).setLevel(logging.ERROR)
    from epd_ray.actors.address import reachable  # not above: the environments of reward packages lack what it needs

    cluster = reachable(address)
    if cluster is not None:
        ray.init(address=cluster, runtime_env={"env_vars": _hiding()} | _handed_over(_variables(env)), **quiet)
        return
    os.environ.update(ONE_MACHINE)
    # Actors import the package from where the driver has it, installed or not.
    here = str(Path(epd_ray.__file__).parent.parent)
    paths = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    several = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read the variable when it was imported, before it was set here
    try:
        started = ray.init(
            address="local",  # else Ray would join one that somebody else has started on this machine
            num_cpus=max(os.cpu_count() or 1, 2),
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": {"PYTHONPATH": paths, **HIDE_GPUS}},
            **quiet,
        )
    except Exception as error:  # Ray has no class of its own for this
        if "timed out during startup" not in str(error):
            raise
        raise ClusterError(
            "Ray has not started within its 30 seconds: end what else keeps this machine busy, then try again"
        ) from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several
    if dashboard:
        url = started.dashboard_url
        log.warning("dashboard: http://%s (it asks for the token that `ray get-auth-token` prints)", url)


@contextmanager
def ray_session(address: str | None, env: Sequence[str] = HANDED_ON, dashboard: bool = False) -> Iterator[None]:
    """Join a Ray cluster or start a local Ray, and leave it afterwards; one that is joined already is used as it is.

    Args:
        address: of a cluster; None for a local Ray, unless a submitted job names its cluster.
        env: names of the environment variables that actors get.
        dashboard: of a Ray that is started here.
    """
    if ray.is_initialized():
        yield
        return
    start_ray(address, env, dashboard)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM (a stopped job) ends a run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _submitted() -> dict[str, Any]:
    """The runtime environment that a submitted job has already; Ray refuses what is given twice."""
    found: dict[str, Any] = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("runtime_env") or {}
    return found


def _variables(names: Sequence[str]) -> dict[str, str]:
    """Those that are set, apart from what a submitted job has."""
    submitted = _submitted()
    there = submitted.get("env_vars") or {}
    values = {name: os.environ[name] for name in names if name in os.environ and name not in there}
    if values and HOOK in submitted:
        raise ClusterError(
            f"the job has a {HOOK} of its own, and Ray takes one alone: submit it without, or with the override "
            f"cluster.env=[] and {', '.join(values)} set on the nodes"
        )
    return values


def _hiding() -> dict[str, str]:
    """HIDE_GPUS, unless a submitted job has its own word on it."""
    there = _submitted().get("env_vars") or {}
    return {name: value for name, value in HIDE_GPUS.items() if name not in there}


def warn_of_idle_gpus(asked: Mapping[str, float]) -> None:
    """Name the settings that leave GPUs unused: forgotten ones would mean days on the CPU.

    Args:
        asked: settings of all actors that could use a GPU -> what they ask for.
    """
    gpus, forgotten = ray.cluster_resources().get("GPU", 0), [key for key, amount in asked.items() if not amount]
    if gpus and forgotten and not _shows_gpus():
        log.warning(
            "the cluster has %g GPUs, and who asks for none runs on CPU cores: set %s", gpus, ", ".join(forgotten)
        )


def _shows_gpus() -> bool:
    """Whether actors see GPUs that they have not asked for: those of a Ray that the user has joined or started."""
    if not ray.is_initialized():
        return False
    variables = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return not HIDE_GPUS.items() <= variables.items()


def _handed_over(values: Mapping[str, str]) -> dict[str, Any]:
    """A runtime environment in which workers set these: Ray keeps the function in its store and logs its name."""

    def set_variables() -> None:  # nested, so that it travels by value: importing this module reads HF_HOME already
        os.environ.update(values)

    return {HOOK: set_variables} if values else {}


@contextmanager
def end_if_broken() -> Iterator[None]:
    """Around an actor's work: after a CUDA error the next call ends the process, so that Ray starts another one.

    torch has one class for all of these errors, and another for too little memory; the causes of an error count too.

    Raises:
        BrokenGpuError: in place of such an error, whose own words it has; nothing else ends outside of actors.
    """
    global _broken
    if _broken:
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(1)
    try:
        yield
    except Exception as error:
        if not _of_gpu(error):
            raise
        _broken = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        raise BrokenGpuError(" ".join(str(error).split())) from error


def _of_gpu(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, torch.AcceleratorError):
        error = error.__cause__ or error.__context__
    return error is not None


def resources(num_cpus: float, num_gpus: float, custom: Mapping[str, float]) -> Resources:
    """What an actor asks for, without what it does not need."""
    return {k: float(v) for k, v in {"CPU": num_cpus, "GPU": num_gpus, **custom}.items() if v}


def keep(images: ImageArray) -> "ray.ObjectRef[ImageArray]":
    """Put pictures into this node's object store, which spills to its disk what does not fit.

    Raises:
        ClusterError: the disk is full too.
    """
    try:
        return ray.put(images)
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError):
        raise ClusterError(
            f"the object store on node {ray.util.get_node_ip_address()} has no room for {images.nbytes / 2**20:.3g} "
            "MiB of images, and its disk none to spill to: make room on the disk, start Ray with more "
            "--object-store-memory, or lower rdpo.staleness or rdpo.prompts_per_iteration"
        ) from None


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


def require_started(actors: Mapping[str, Sequence[ActorHandle[Any]]], timeout_s: float = START_SECONDS) -> None:
    """Wait for processes, which another run may have left no room for since `require_room`; not for models to load.

    Args:
        actors: what they are ("rollout actors") -> handles.
        timeout_s: generous; on a busy machine a process takes a minute to start.

    Raises:
        PlacementError: how many did not start.
    """
    for kind, handles in actors.items():
        references = [actor.__ray_ready__.remote() for actor in handles]
        if not references:
            continue
        _, missing = ray.wait(references, num_returns=len(references), timeout=timeout_s)
        if missing:
            fix = "if another run has taken their room, wait for its end; or add nodes"
            raise PlacementError(f"{len(missing)} of {len(handles)} {kind} did not start in {timeout_s:.0f} s: {fix}")


def _shortage(bundles: Mapping[str, Sequence[Resources]], timeout_s: float) -> str:
    free = ray.available_resources()
    needs: Resources = {}
    for group in bundles.values():
        for bundle in group:
            for name, amount in bundle.items():
                needs[name] = needs.get(name, 0.0) + amount
    short = {n: a for n, a in needs.items() if a > free.get(n, 0.0) + 1e-9} or needs
    missing = ", ".join(f"{n}: {a:g} asked, {free.get(n, 0.0):g} free" for n, a in short.items())
    who = "; ".join(f"{kind}: {_counted(group)}" for kind, group in bundles.items() if group)
    fix = "ask for less under cluster and rewards, or add nodes"
    return f"no room for the actors after {timeout_s:.0f} s ({missing}): {fix} ({who})"


def _counted(group: Sequence[Resources]) -> str:
    """Equal bundles together: "2 x 1 CPU, 0.2 GPU and 1 x 1 CPU"."""
    alike = Counter(", ".join(f"{amount:g} {name}" for name, amount in b.items()) or "nothing" for b in group)
    return " and ".join(f"{count} x {bundle}" for bundle, count in alike.items())
