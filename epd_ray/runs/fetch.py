"""Weights on every node before a run: the files that its actors will open, once per node."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from epd_ray.actors.cluster import ray_session
from epd_ray.actors.reward_pool import RewardSpec, insist, start_head, unwrap
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import AUTO
from epd_ray.errors import EpdRayError, ModelError
from epd_ray.telemetry.progress import Observer
from epd_ray.weights.hub import opening

NOT_OPENED = ("safety_checker", "feature_extractor", "image_encoder")  # the backbone does without them
POLL_SECONDS = 0.5


class FetchError(EpdRayError):
    """Weights that could not be placed on some node; a line for each."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, by Ray's id and its address."""

    node_id: str
    address: str

    def __str__(self) -> str:
        return f"node {self.address} ({self.node_id[:8]})"


@dataclass(frozen=True)
class Item:
    """Something that every node needs.

    Attributes:
        what: for people.
        place: runs on the node; raises what goes wrong.
        arguments: of `place`.
    """

    what: str
    place: Callable[..., None]
    arguments: tuple[Any, ...]


def fetch(config: RunConfig, observer: Observer) -> list[str]:
    """Place a run's weights on every alive node: the pipeline's files, and what each reward head opens.

    Args:
        config: of the run.
        observer: sees the progress.

    Returns:
        A line per node: what is there, and the seconds that each took.

    Raises:
        FetchError: a line for everything that is missing, with its node.
    """
    items = _items(config)
    with ray_session(config.cluster.address, config.cluster.env):
        nodes = [Node(n["NodeID"], n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]]
        observer.stage("fetching", len(nodes) * len(items))
        placed: dict[Node, list[str]] = {node: [] for node in nodes}
        problems = []
        for item in items:  # one after the other: two heads opened at once could take more memory than a node has
            for node, seconds, problem in _on_all(item, nodes):
                observer.advance()
                if problem is None:
                    placed[node].append(f"{item.what} in {seconds:.1f} s")
                else:
                    problems.append(f"{node}: {item.what}: {problem}")
    if problems:
        raise FetchError("\n".join(problems))
    return [f"{node}: {', '.join(done)}" for node, done in placed.items()]


def _items(config: RunConfig) -> list[Item]:
    from epd_ray.rdpo.session import rdpo_config

    backbone, specs = config.backbone, rdpo_config(config, ["any"]).reward_specs
    # Other families are computed, or somebody's own class: nothing is known here of their files.
    model = [Item(f"model {backbone.model}", fetch_model, (backbone.model, backbone.revision))]
    heads = [Item(f"reward {name}", fetch_head, (name, spec)) for name, spec in specs.items()]
    return [*(model if backbone.family == AUTO else []), *heads]


def _on_all(item: Item, nodes: Sequence[Node]) -> Iterator[tuple[Node, float, str | None]]:
    """Each node with the seconds it took and what went wrong there, in the order they finish."""
    start, task = time.monotonic(), ray.remote(item.place)
    waiting = {task.options(max_retries=0, **_there(node.node_id)).remote(*item.arguments): node for node in nodes}
    while waiting:
        for reference in ray.wait(list(waiting), timeout=POLL_SECONDS)[0]:
            yield waiting.pop(reference), time.monotonic() - start, _problem(reference)


def _there(node_id: str) -> dict[str, Any]:
    """Ray options of what runs on one node, however busy it is."""
    return {
        "num_cpus": 0,
        "num_gpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }


def _problem(reference: "ray.ObjectRef[Any]") -> str | None:
    try:
        ray.get(reference)
    except (ray.exceptions.RayTaskError, ray.exceptions.RayError) as error:  # the latter: the node itself is lost
        cause = unwrap(error) if isinstance(error, ray.exceptions.RayTaskError) else error
        if isinstance(cause, EpdRayError):
            return str(cause)
        first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        return f"{type(cause).__name__}: {first}"
    return None


def fetch_model(model: str, revision: str | None) -> None:
    """Download a pipeline's files into this machine's cache; of a directory, see that it is here.

    Raises:
        ModelError: no such model, none that can be reached, or of a family that nothing here drives.
    """
    from epd_ray.backbones.auto import FAMILIES
    from epd_ray.backbones.loading import read_index

    index = read_index(model, revision)  # a small file, before gigabytes that nobody could use
    if index.class_name not in FAMILIES.names():
        known = ", ".join(FAMILIES.names())
        raise ModelError(f"model {model!r} is a {index.class_name}, supported are: {known}")
    if Path(index.location).is_dir():
        return
    from diffusers import DiffusionPipeline

    left_out: dict[str, None] = dict.fromkeys(NOT_OPENED)
    with opening(model):
        DiffusionPipeline.download(model, revision=revision, **left_out)


def fetch_head(name: str, spec: RewardSpec) -> None:
    """Open a head once on this machine's CPU, in its own environment where it has one, and end it.

    Raises:
        ModelError: its environment is not built here.
        EpdRayError: the head's own error.
    """
    options = {**spec.options, **({"device": "cpu"} if "device" in spec.options else {})}  # the GPUs may be taken
    if spec.python is not None and not Path(spec.python).is_file():
        raise ModelError(f"{spec.python} is not here: run `epd-ray rewards install` on this node")
    there = _there(ray.get_runtime_context().get_node_id())
    handle = start_head(name, replace(spec, options=options), there)
    try:
        insist(handle, f"reward head {name!r}", "loading", handle.ready.remote)
    finally:
        ray.kill(handle)
