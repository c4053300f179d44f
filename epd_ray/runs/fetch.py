"""`epd-ray fetch`: download the weights that the actors of a run open, once to every node."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from epd_ray.actors.configured import run_session
from epd_ray.actors.reward_pool import RewardSpec, insist, start_head, unwrap
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import OPENED
from epd_ray.errors import EpdRayError, HubError, ModelError, shown
from epd_ray.telemetry.progress import Observer
from epd_ray.weights.hub import opening

NOT_OPENED = ("safety_checker", "feature_extractor", "image_encoder")  # the backbone does not use them
POLL_SECONDS = 0.5


class FetchError(EpdRayError):
    """Weights that could not be downloaded to some node, with one line for each."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, with its id in Ray and its address."""

    node_id: str
    address: str

    def __str__(self) -> str:
        return f"node {self.address} ({self.node_id[:8]})"


@dataclass(frozen=True)
class Item:
    """Something that every node needs.

    Attributes:
        what: the name that messages show.
        place: the function that runs on the node, and raises an error if the item cannot be placed there.
        arguments: the positional arguments of `place`.
    """

    what: str
    place: Callable[..., None]
    arguments: tuple[Any, ...]


def fetch(config: RunConfig, observer: Observer) -> list[str]:
    """Download the weights of a run, the files of the pipeline and of each reward head, to every node that is alive.

    Args:
        config: the configuration of the run.
        observer: sees the progress.

    Returns:
        One line per node with its items, and the seconds that each item took.

    Raises:
        FetchError: something could not be downloaded; one line per item and node.
        EpdRayError: see `run_session`.
    """
    items = _items(config)
    with run_session(config):
        nodes = [Node(n["NodeID"], n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]]
        observer.stage("fetching", len(nodes) * len(items))
        placed: dict[Node, list[str]] = {node: [] for node in nodes}
        problems: list[str] = []
        cut_off: dict[Node, list[str]] = {}  # the nodes that cannot reach the hub -> what is not tried there
        for item in items:  # one by one, because two heads that are open at once may need more memory than a node has
            for left in cut_off.values():
                left.append(item.what)
                observer.advance()
            for node, seconds, error in _on_all(item, [node for node in nodes if node not in cut_off]):
                observer.advance()
                if error is None:
                    placed[node].append(f"{item.what} in {seconds:.1f} s")
                    continue
                problems.append(f"{node}: {item.what}: {_line(error)}")
                if isinstance(error, HubError):
                    cut_off[node] = []
    problems += [f"{node}: not tried without the hub: {', '.join(left)}" for node, left in cut_off.items() if left]
    if problems:
        raise FetchError("\n".join(problems))
    return [f"{node}: {', '.join(done)}" for node, done in placed.items()]


def _items(config: RunConfig) -> list[Item]:
    from epd_ray.rdpo.session import rdpo_config

    backbone, specs = config.backbone, rdpo_config(config, ["any"]).reward_specs
    # Other families have no files, or are classes of the user, whose files are not known here.
    model = [Item(f"model {backbone.model}", fetch_model, (backbone.model, backbone.revision))]
    heads = [Item(f"reward {name}", fetch_head, (name, spec)) for name, spec in specs.items()]
    return [*(model if backbone.family in OPENED else []), *heads]


def _on_all(item: Item, nodes: Sequence[Node]) -> Iterator[tuple[Node, float, BaseException | None]]:
    """Place an item on all nodes; yields each node with the seconds and the error, if any, as soon as it is done."""
    start, task = time.monotonic(), ray.remote(item.place)
    waiting = {task.options(max_retries=0, **_there(node.node_id)).remote(*item.arguments): node for node in nodes}
    while waiting:
        for reference in ray.wait(list(waiting), timeout=POLL_SECONDS)[0]:
            yield waiting.pop(reference), time.monotonic() - start, _error(reference)


def _there(node_id: str) -> dict[str, Any]:
    """The options of Ray for work that runs on one node, however busy the node is."""
    return {
        "num_cpus": 0,
        "num_gpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }


def _error(reference: "ray.ObjectRef[Any]") -> BaseException | None:
    try:
        ray.get(reference)
    except (ray.exceptions.RayTaskError, ray.exceptions.RayError) as error:  # the latter where the node is lost
        return unwrap(error) if isinstance(error, ray.exceptions.RayTaskError) else error
    return None


def _line(error: BaseException) -> str:
    if isinstance(error, EpdRayError):
        return str(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"


def fetch_model(model: str, revision: str | None) -> None:
    """Download the files of a pipeline into the cache of this machine, or check that a local directory is there.

    Raises:
        ModelError: the model does not exist, cannot be reached, or is of a family that this package does not support.
    """
    from epd_ray.backbones.index import supported_index

    index = supported_index(model, revision)  # a small file, read before gigabytes are downloaded in vain
    if Path(index.location).is_dir():
        return
    from diffusers import DiffusionPipeline

    left_out: dict[str, None] = dict.fromkeys(NOT_OPENED)
    with opening(model):
        DiffusionPipeline.download(model, revision=revision, **left_out)


def fetch_head(name: str, spec: RewardSpec) -> None:
    """Load a head once on the CPU of this machine, in its own environment if it has one, and end it.

    Raises:
        ModelError: the environment of the head is not built on this machine.
        EpdRayError: the head cannot be loaded.
    """
    options = {**spec.options, **({"device": "cpu"} if "device" in spec.options else {})}  # the GPUs may be in use
    if spec.python is not None and not Path(spec.python).is_file():
        raise ModelError(f"{spec.python} does not exist: run `epd-ray rewards install` on this node")
    there = _there(ray.get_runtime_context().get_node_id())
    handle = start_head(name, replace(spec, options=options), there)
    try:
        insist(handle, f"reward head {shown(name)}", "loading", handle.ready.remote)
    finally:
        ray.kill(handle)
