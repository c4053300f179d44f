"""A simulated cluster whose actors can be caught in the middle of their work: what the fault bench kills things on."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from torch import Tensor

from epd_ray.actors.cluster import ONE_MACHINE
from epd_ray.backbones.gaussian import GaussianConditioning
from epd_ray.backbones.simulated import SimulatedBackbone
from epd_ray.rdpo.learner import RDPOLearner
from epd_ray.rewards.simulated import SimulatedHead
from epd_ray.storage.run_directory import write_text
from epd_ray.types import Conditioning

PATIENCE_SECONDS = 400.0
POLL_SECONDS = 0.05
FAILING_PROMPT = "a prompt that fails"
FOLDER = "trap_folder"
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Fault:
    """What a fault did to a run.

    Attributes:
        recovered: the run reached its end.
        seconds: lost to it. In an algorithm that lives on: what all iterations took beyond as many undisturbed ones.
            Where the driver died: from its death to the first new iteration on the disk, Ray's start included.
        lost: pictures that were asked for and not learned from.
        duplicated: pictures that were learned from again.
        identical: every reward, advantage and policy is that of the undisturbed run, bit by bit.
        reported: seconds of recovery by the algorithm's own metrics, added up over its tasks; None where it has none.
    """

    recovered: bool
    seconds: float
    lost: int
    duplicated: int
    identical: bool
    reported: float | None = None


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """Ask until the answer is true; that answer.

    Raises:
        TimeoutError: PATIENCE_SECONDS have passed.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"{what}: not within {PATIENCE_SECONDS:.0f} s")


# -- traps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caught:
    """A process that waits for its end, and the node that it is on."""

    pid: int
    node_id: str


@dataclass(frozen=True)
class Trap:
    """A point of the work at which one process, once, stops until it is killed.

    Attributes:
        folder: that all processes see.
        name: of the point.
    """

    folder: Path
    name: str

    def set(self) -> None:
        """The next process that passes is caught."""
        (self.folder / self.name).touch()

    def unset(self) -> None:
        """Nobody is caught any more, and whoever was is forgotten."""
        for name in (self.name, f"{self.name}.caught"):
            (self.folder / name).unlink(missing_ok=True)

    def spring(self) -> None:
        """To be called at that point of the work."""
        mine = self.folder / f"{self.name}.{os.getpid()}"
        try:
            (self.folder / self.name).rename(mine)  # for one process alone
        except FileNotFoundError:
            return
        write_text(self.folder / f"{self.name}.caught", f"{os.getpid()} {ray.get_runtime_context().get_node_id()}")
        time.sleep(PATIENCE_SECONDS)

    def wait(self) -> Caught:
        """Block until a process is caught."""
        path = self.folder / f"{self.name}.caught"
        wait_for(f"nobody at {self.name!r}", path.exists)
        pid, node_id = path.read_text().split()
        path.unlink()
        return Caught(int(pid), node_id)


class StuckError(Exception):
    """A run that neither ends nor fails, so that nothing else can be measured in this process."""


@contextmanager
def beside(work: Callable[[], Answer], traps: Sequence[Trap]) -> "Iterator[Future[Answer]]":
    """Work in a thread, so that this one can add nodes (Ray wants the main thread); left when the work has ended.

    Args:
        work: that uses the algorithm, which only one may do at a time.
        traps: on its way, which are taken up at the end.

    Raises:
        StuckError: it does not end.
    """
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        yield future
    finally:
        for trap in traps:
            trap.unset()
        if not wait([future], 2 * PATIENCE_SECONDS).done:  # a process that is caught goes on after half of it
            raise StuckError(f"work has not ended {2 * PATIENCE_SECONDS:.0f} s after it was given up")


class TrappedBackbone(SimulatedBackbone):
    """Stops in the middle of a picture when "draw" is set, fails on one prompt, and notes the nodes that draw."""

    def __init__(self, *, folder: str, latency: float = 0.0) -> None:
        super().__init__(latency=latency)
        self._folder, self._noted = Path(folder), False

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> GaussianConditioning:
        if FAILING_PROMPT in prompts:
            raise RuntimeError("this prompt fails")
        return super().encode(prompts, guidance_scale)

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if not self._noted:
            self._noted = True
            drawn_on(self._folder, ray.get_runtime_context().get_node_id()).touch()
        Trap(self._folder, "draw").spring()
        return super().drift(x, sigma, conditioning)


def drawn_on(folder: Path, node_id: str) -> Path:
    """A file that is there once a node has drawn."""
    return folder / f"drawn-on-{node_id}"


class TrappedHead(SimulatedHead):
    """Stops in the middle of a batch when "score" is set."""

    def __init__(self, *, folder: str, latency: float = 0.0) -> None:
        super().__init__(latency=latency)
        self._trap = Trap(Path(folder), "score")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self._trap.spring()
        return super().score(images, prompts)


class TrappedLearner(RDPOLearner):
    """Stops in the middle of an update when "learn" is set."""

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: Mapping[str, Tensor]
    ) -> Tensor:
        Trap(Path(self.config.learner_config_dict[FOLDER]), "learn").spring()
        return super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)


# -- the cluster ------------------------------------------------------------------------------------------------------


class Nodes:
    """Raylets on this machine, on loopback: a head for the driver, and workers told apart by a custom resource."""

    def __init__(self) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "node_ip_address": "127.0.0.1",
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": _free_port(),
                "dashboard_agent_listen_port": _free_port(),  # jobs go through it; its usual one may be taken
            },
        )

    @property
    def address(self) -> str:
        """Of the cluster, for ray.init."""
        return str(self._cluster.address)

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self._cluster.webui_url}"

    def add(self, kind: str) -> str:
        """A node with one CPU and one of the resource `kind`; its id."""
        node = self._cluster.add_node(num_cpus=1, resources={kind: 1}, node_ip_address="127.0.0.1")
        return str(node.node_id)

    def remove(self, node_id: str) -> None:
        """SIGKILL to all of a node's processes, workers included."""
        (node,) = [n for n in self._cluster.worker_nodes if n.node_id == node_id]
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def simulated_nodes(*kinds: str) -> Iterator[Nodes]:
    """A head and a worker node per kind; this process is their driver until the end."""
    os.environ.update(ONE_MACHINE)
    several = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read the variable when it was imported
    nodes = Nodes()
    try:
        for kind in kinds:
            nodes.add(kind)
        ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = several


def living_actors(job_id: str | None = None) -> list[Any]:
    """The actors that are alive, all or one driver's."""
    filters = [("state", "=", "ALIVE"), *([] if job_id is None else [("job_id", "=", job_id)])]
    return list(list_actors(filters=filters))
