"""Starting Ray or joining a cluster, the environment of its processes, and checks of the room for actors."""

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
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants
from ray.actor import ActorHandle

from epd_ray.actors.quiet import silent_start
from epd_ray.actors.watch import watched
from epd_ray.errors import ClusterError, ConfigError, EpdRayError, PlacementError
from epd_ray.types import ImageArray

log = logging.getLogger(__name__)

Resources = dict[str, float]
START_SECONDS = 600.0
LAST_WORDS_SECONDS = 1.0  # in which the error leaves a process that ends with its next call
HIDE_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Without this variable an actor that asks for no GPU could use all of them, and Ray would not count it."""
ONE_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray listens on every network interface
    "RAY_USAGE_STATS_ENABLED": "0",
}

SHORT_FOLDER = "/tmp/ray"
LONGEST_TEMPORARY = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes of the temporary directory, at most: the path of a socket has 107, and Ray puts its sockets below it."""

HANDED_ON = ("HF_TOKEN", "HF_HOME")
"""Environment variables that actors get, unless `cluster.env` names others."""

HOOK = "worker_process_setup_hook"
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in which `ray job submit` passes its runtime environment

_broken = False  # whether a CUDA error has made the GPU useless for this process


class BrokenGpuError(EpdRayError):
    """A CUDA error, after which its process cannot use the GPU any more; the message is that of CUDA in one line."""


def start_ray(
    address: str | None = None,
    env: Sequence[str] = HANDED_ON,
    dashboard: bool = False,
    modules: Sequence[str] = (),
) -> None:
    """Join the cluster at `address` or in RAY_ADDRESS, which submitted jobs have; without either, start Ray locally.

    The values of the variables stay out of Ray's runtime environment, which Ray writes into its logs. The workers of a
    local Ray inherit the environment of the driver; those of a cluster set the variables before anything else.

    Args:
        address: the address of a cluster, host:port or "auto".
        env: the names of environment variables; those that are set in this process reach every actor.
        dashboard: whether a local Ray starts its dashboard, on 127.0.0.1.
        modules: absolute paths of modules and packages that actors import; those of a cluster get copies.

    Raises:
        ClusterError: the cluster cannot be joined, or a local Ray does not start.
        ConfigError: the submitted job brings modules of its own.
    """
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    for name in ("ray", "ray.rllib"):  # their notices of migrations and missing extras do not concern the run
        logging.getLogger(name).setLevel(logging.ERROR)
    from epd_ray.actors.address import reachable  # not at the top: environments of reward packages lack what it imports

    cluster = reachable(address)
    if cluster is not None:
        own = _handed_over(_variables(env)) | _sent(modules)
        with silent_start():
            ray.init(address=cluster, runtime_env={"env_vars": _hiding()} | own, **quiet)
        return
    os.environ.update(ONE_MACHINE)
    # Actors import the package from the same folder as the driver, also where it is not installed.
    folders = dict.fromkeys(str(Path(module).parent) for module in modules)
    here = str(Path(__file__).parents[2])
    paths = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH"), *folders) if p)
    # Ray has read the variables of both already, when it was imported. Under `uv run` it would pack the working
    # directory, and start each actor by uv in a copy of it.
    before = {name: getattr(ray_constants, name) for name in ("ENABLE_RAY_CLUSTER", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")}
    for name in before:
        setattr(ray_constants, name, False)
    try:
        with silent_start():
            started = ray.init(
                address="local",  # otherwise Ray would join one that another user has started on this machine
                num_cpus=max(os.cpu_count() or 1, 2),
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                _temp_dir=_short_folder(),
                runtime_env={"env_vars": {"PYTHONPATH": paths, **HIDE_GPUS}},
                **quiet,
            )
    except Exception as error:  # Ray has no class for this error
        if "timed out during startup" not in str(error):
            raise
        raise ClusterError("Ray did not start within 30 s: stop other work on this machine, then try again") from error
    finally:
        for name, value in before.items():
            setattr(ray_constants, name, value)
    if dashboard:
        url = started.dashboard_url
        log.warning("The dashboard is at http://%s; it asks for the token that `ray get-auth-token` prints.", url)


def _short_folder() -> str | None:
    """The folder of Ray where the temporary directory is too long for its sockets; None lets Ray choose."""
    folder = get_default_system_temp_dir()
    if (length := len(os.fsencode(folder))) <= LONGEST_TEMPORARY:
        return None
    log.warning(
        "Ray keeps its files in %s: the temporary directory %s has %d bytes, its sockets take at most %d "
        "(set TMPDIR or RAY_TMPDIR)",
        SHORT_FOLDER,
        folder,
        length,
        LONGEST_TEMPORARY,
    )
    return SHORT_FOLDER


@contextmanager
def ray_session(
    address: str | None,
    env: Sequence[str] = HANDED_ON,
    dashboard: bool = False,
    modules: Sequence[str] = (),
) -> Iterator[None]:
    """Join a Ray cluster or start a local Ray, and leave it at the end of the block.

    Where this process has joined Ray already, the block uses that Ray and does not end it.

    Args:
        address: the address of a cluster; None starts a local Ray, unless RAY_ADDRESS names a cluster.
        env: the names of the environment variables that actors get.
        dashboard: whether a local Ray starts its dashboard.
        modules: absolute paths of modules and packages that actors import.

    Raises:
        ClusterError: the cluster cannot be joined, or the Ray that was started here died.
        ConfigError: the submitted job brings modules of its own.
    """
    if ray.is_initialized():
        yield
        return
    start_ray(address, env, dashboard, modules)
    try:
        with watched():
            yield
    finally:
        ray.shutdown()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Let SIGTERM, which stops a submitted job, end a run in the same way as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _submitted() -> dict[str, Any]:
    """The runtime environment of a submitted job; Ray refuses keys that are given twice."""
    found: dict[str, Any] = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("runtime_env") or {}
    return found


def _sent(modules: Sequence[str]) -> dict[str, list[str]]:
    """The part of the runtime environment that copies modules to the nodes."""
    if modules and "py_modules" in _submitted():
        raise ConfigError(
            ["cluster.py_modules: the job was submitted with py_modules of its own: name all there, or all here"]
        )
    return {"py_modules": list(modules)} if modules else {}


def _variables(names: Sequence[str]) -> dict[str, str]:
    """The variables that are set in this process, without those of a submitted job."""
    submitted = _submitted()
    there = submitted.get("env_vars") or {}
    values = {name: os.environ[name] for name in names if name in os.environ and name not in there}
    if values and HOOK in submitted:
        raise ClusterError(
            f"the job has its own {HOOK}, but Ray takes only one: submit it without, or with the override "
            f"cluster.env=[] and {', '.join(values)} set on the nodes"
        )
    return values


def _hiding() -> dict[str, str]:
    """HIDE_GPUS, without what a submitted job sets itself."""
    there = _submitted().get("env_vars") or {}
    return {name: value for name, value in HIDE_GPUS.items() if name not in there}


def warn_of_idle_gpus(asked: Mapping[str, float]) -> None:
    """Warn where the cluster has GPUs and actors that could use one ask for none, which may cost days.

    Args:
        asked: the settings of all actors that could use a GPU -> the number of GPUs that they ask for.
    """
    gpus, forgotten = ray.cluster_resources().get("GPU", 0), [key for key, amount in asked.items() if not amount]
    if gpus and forgotten and not _shows_gpus():
        log.warning(
            "the cluster has %g GPUs, but actors that ask for none run on CPU cores: set %s", gpus, ", ".join(forgotten)
        )


def _shows_gpus() -> bool:
    """Whether actors see GPUs that they did not ask for, as in a Ray that the user started without HIDE_GPUS."""
    if not ray.is_initialized():
        return False
    variables = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return not HIDE_GPUS.items() <= variables.items()


def _handed_over(values: Mapping[str, str]) -> dict[str, Any]:
    """A runtime environment in which each worker sets variables by a function, of which Ray logs only the name."""

    def set_variables() -> (
        None
    ):  # nested, so that Ray pickles it by value: importing this module would read HF_HOME too early
        os.environ.update(values)

    return {HOOK: set_variables} if values else {}


@contextmanager
def end_if_broken() -> Iterator[None]:
    """Surround the work of an actor: after a CUDA error its next call ends the process, so that Ray starts another one.

    Too little memory is not a CUDA error here, because the process recovers from it. Outside of an actor the process
    does not end.

    Raises:
        BrokenGpuError: the work, or a cause of its error, raised a CUDA error (torch.AcceleratorError).
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
    """The resources that an actor asks for, without those of amount 0."""
    return {k: float(v) for k, v in {"CPU": num_cpus, "GPU": num_gpus, **custom}.items() if v}


def keep(images: ImageArray) -> "ray.ObjectRef[ImageArray]":
    """Put pictures into the object store of this node, which moves to disk what does not fit into memory.

    Raises:
        ClusterError: the disk is full too.
    """
    try:
        return ray.put(images)
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError):
        raise ClusterError(
            f"the object store on node {ray.util.get_node_ip_address()} has no room for {images.nbytes / 2**20:.3g} "
            "MiB of images, in memory or on disk: free some space on the disk, start Ray with more "
            "--object-store-memory, or lower rdpo.staleness or rdpo.prompts_per_iteration"
        ) from None


def require_room(bundles: Mapping[str, Sequence[Resources]], timeout_s: float) -> None:
    """Check that all actors fit the cluster together, before any of them loads a model.

    Args:
        bundles: every kind of actor, such as "rollout actors" -> the resources of each of its actors.
        timeout_s: the seconds to wait for room, in which nodes may join.

    Raises:
        PlacementError: the actors do not fit; the message names the resources that are short, and who asks for them.
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
    """Wait until the processes of actors have started, but not until they have loaded their models.

    Another run may have taken their room since `require_room`.

    Args:
        actors: every kind of actor, such as "rollout actors" -> its handles.
        timeout_s: the seconds to wait; on a busy machine a process takes a minute to start.

    Raises:
        PlacementError: some actors did not start; the message says how many.
    """
    for kind, handles in actors.items():
        references = [actor.__ray_ready__.remote() for actor in handles]
        if not references:
            continue
        _, missing = ray.wait(references, num_returns=len(references), timeout=timeout_s)
        if missing:
            fix = "if another run has taken their room, wait for its end, or add nodes"
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
    """Bundles with equal ones counted, such as "2 x 1 CPU, 0.2 GPU and 1 x 1 CPU"."""
    alike = Counter(", ".join(f"{amount:g} {name}" for name, amount in b.items()) or "nothing" for b in group)
    return " and ".join(f"{count} x {bundle}" for bundle, count in alike.items())
