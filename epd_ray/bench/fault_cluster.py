"""A simulated cluster whose actors can be caught in the middle of their work, so that they are killed there."""

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
    """The damage that a fault did to a run.

    Attributes:
        recovered: whether the run reached its end.
        seconds: time lost. Where the algorithm lived on, the time of all its iterations minus that of as many
            undisturbed ones; where the driver died, the time from its death to the first new iteration on the disk;
            None where the run did not recover.
        lost: number of pictures that were asked for and not learned from.
        duplicated: number of pictures that were learned from twice.
        identical: whether every reward, advantage and policy equals that of the undisturbed run, bit by bit.
        reported: seconds of recovery in the algorithm's own metrics, summed over its tasks; None where there are none.
    """

    recovered: bool
    seconds: float | None
    lost: int
    duplicated: int
    identical: bool
    reported: float | None = None


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """Ask until the answer is true, and return this answer.

    Args:
        what: what is waited for, for the message of the error.
        condition: gives the answer.

    Raises:
        TimeoutError: the answer was not true within PATIENCE_SECONDS.
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
    """A process that waits to be killed, and the id of the node that it runs on."""

    pid: int
    node_id: str


@dataclass(frozen=True)
class Trap:
    """A point of the work at which one process stops until it is killed, once for each time that the trap is set.

    Attributes:
        folder: a folder that all processes see.
        name: name of the point.
    """

    folder: Path
    name: str

    def set(self) -> None:
        """Catch the next process that passes."""
        (self.folder / self.name).touch()

    def unset(self) -> None:
        """Catch no process any more, and forget one that was caught."""
        for name in (self.name, f"{self.name}.caught"):
            (self.folder / name).unlink(missing_ok=True)

    def spring(self) -> None:
        """Stop here if the trap is set; called at that point of the work."""
        mine = self.folder / f"{self.name}.{os.getpid()}"
        try:
            (self.folder / self.name).rename(mine)  # succeeds in one process alone
        except FileNotFoundError:
            return
        write_text(self.folder / f"{self.name}.caught", f"{os.getpid()} {ray.get_runtime_context().get_node_id()}")
        time.sleep(PATIENCE_SECONDS)

    def wait(self) -> Caught:
        """Wait until a process is caught.

        Raises:
            TimeoutError: no process was caught within PATIENCE_SECONDS.
        """
        path = self.folder / f"{self.name}.caught"
        wait_for(f"nobody at {self.name!r}", path.exists)
        pid, node_id = path.read_text().split()
        path.unlink()
        return Caught(int(pid), node_id)


class StuckError(Exception):
    """A run neither ends nor fails, so that nothing else can be measured in this process."""


@contextmanager
def beside(work: Callable[[], Answer], traps: Sequence[Trap]) -> "Iterator[Future[Answer]]":
    """Run work in another thread, because Ray adds nodes only in the main one; the context waits for its end.

    Args:
        work: uses the algorithm, which no other thread may use at the same time.
        traps: traps that the work passes; they are unset at the end.

    Raises:
        StuckError: the work does not end.
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
        if not wait([future], 2 * PATIENCE_SECONDS).done:  # a caught process goes on after half of this time
            raise StuckError(f"work has not ended {2 * PATIENCE_SECONDS:.0f} s after it was given up")


class TrappedBackbone(SimulatedBackbone):
    """Stops in the middle of a picture when the trap "draw" is set, fails on one prompt, and notes which nodes draw."""

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
    """The file that exists once a node has drawn."""
    return folder / f"drawn-on-{node_id}"


class TrappedHead(SimulatedHead):
    """Stops in the middle of a batch when the trap "score" is set."""

    def __init__(self, *, folder: str, latency: float = 0.0) -> None:
        super().__init__(latency=latency)
        self._trap = Trap(Path(folder), "score")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self._trap.spring()
        return super().score(images, prompts)


class TrappedLearner(RDPOLearner):
    """Stops in the middle of an update when the trap "learn" is set."""

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: Mapping[str, Tensor]
    ) -> Tensor:
        Trap(Path(self.config.learner_config_dict[FOLDER]), "learn").spring()
        return super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)


# -- the cluster ------------------------------------------------------------------------------------------------------


class Nodes:
    """Ray nodes on this machine, on loopback: a head for the driver, and workers told apart by a custom resource."""

    def __init__(self) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "node_ip_address": "127.0.0.1",
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": _free_port(),
                "dashboard_agent_listen_port": _free_port(),  # jobs go through it, and its usual port may be taken
            },
        )

    @property
    def address(self) -> str:
        """Address of the cluster, for ray.init."""
        return str(self._cluster.address)

    @property
    def dashboard(self) -> str:
        """URL to which jobs are submitted."""
        return f"http://{self._cluster.webui_url}"

    def add(self, kind: str) -> str:
        """Add a node with one CPU and one of the resource `kind`, and return its id."""
        node = self._cluster.add_node(num_cpus=1, resources={kind: 1}, node_ip_address="127.0.0.1")
        return str(node.node_id)

    def remove(self, node_id: str) -> None:
        """Send SIGKILL to all processes of a node, workers included."""
        (node,) = [n for n in self._cluster.worker_nodes if n.node_id == node_id]
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def simulated_nodes(*kinds: str) -> Iterator[Nodes]:
    """A head and a worker node for each kind; this process is their driver until the context ends."""
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
    """The actors of the connected cluster that are alive: all of them, or those of the driver with this job id."""
    filters = [("state", "=", "ALIVE"), *([] if job_id is None else [("job_id", "=", job_id)])]
    return actors_where(filters)


def actors_where(filters: list[tuple[str, str, Any]]) -> list[Any]:
    """The actors of the connected cluster that pass all `filters` (Ray's triples of column, "=" and value).

    The cluster's address is passed on: without it, Ray looks for running clusters on the machine and refuses to choose
    where there are several.
    """
    return list(list_actors(ray.get_runtime_context().gcs_address, filters=filters))
