"""Runs whose driver is killed, of the command line or of a submitted job, against a run that was left alone."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from ray.job_submission import JobStatus, JobSubmissionClient

from epd_ray.bench.fault_cluster import Fault, Nodes, actors_where, living_actors, wait_for
from epd_ray.bench.settings import simulated
from epd_ray.storage.rollouts import TIMINGS

HIT = 3  # the driver is killed once this iteration is on the disk
SETTINGS = (
    *simulated(batch_s=0.16, score_s=0.04),
    "distill.prompts=8",
    "distill.teacher_steps=2",
    "distill.grid=5",
    "prompts.num_train=16",
    "prompts.validation=8",
    "prompts.test=8",
    "rdpo.iterations=8",
    "evaluation.every=3",
    "evaluation.baselines=[euler]",
    "evaluation.tune=false",
    "checkpoint.every=2",
    "cluster.rollout_actors=1",
    "cluster.rollout_cpus=0.25",
    "cluster.learner_actors=0",
)


@dataclass(frozen=True)
class Leftover:
    """The parts of a finished run that must be the same whatever happened to it.

    Attributes:
        solver: text of the solver's file.
        ids: ids of all pictures that the run learned from.
        rows: rows of all its rollout files, without their times.
    """

    solver: str
    ids: tuple[str, ...]
    rows: tuple[dict[str, object], ...]


def leftover(run: Path) -> Leftover:
    """Read these parts from a run directory."""
    tables = [pq.read_table(path).drop_columns(list(TIMINGS)) for path in rollout_files(run)]
    rows = [row for table in tables for row in table.to_pylist()]
    ids = tuple(str(row["rollout_id"]) for row in rows)
    return Leftover((run / "solver" / "solver.json").read_text(), ids, tuple(rows))


def rollout_files(run: Path) -> list[Path]:
    """The rollout files of a run, one for each iteration, in order."""
    return sorted((run / "rollouts").glob("iteration-*.parquet"))


class RunBench:
    """Runs in processes of their own.

    Args:
        nodes: a cluster that outlives the runs, with room for their actors.
        folder: folder for the run directories.
    """

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        self._jobs = JobSubmissionClient(nodes.dashboard)
        calm = folder / "calm"
        with self._started(self._begin(calm, self._joined)) as process:
            self._finish(process)
        self.calm = leftover(calm)

    @property
    def _joined(self) -> str:
        return f"cluster.address={self.nodes.address}"

    def _begin(self, run: Path, *overrides: str) -> list[str]:
        return ["train", "--out", str(run), *SETTINGS, *overrides]

    @contextmanager
    def _started(self, arguments: Sequence[str]) -> "Iterator[subprocess.Popen[bytes]]":
        """Start a run that is killed at the end of the context."""
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "epd_ray.cli", *arguments]
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.kill()

    def _finish(self, process: "subprocess.Popen[bytes]") -> None:
        if code := process.wait():
            raise RuntimeError(f"epd-ray ended with {code}: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]

    def _compare(self, run: Path, killed: float, goes_on: float) -> Fault:
        found, calm = leftover(run), self.calm
        lost, twice = len(set(calm.ids) - set(found.ids)), len(found.ids) - len(set(found.ids))
        return Fault(True, goes_on - killed, lost, twice, found == calm)

    # -- the command line ---------------------------------------------------------------------------------------------

    def local_driver(self) -> Fault:
        """Send SIGKILL to a run that started Ray itself, wait until its actors have ended, and resume it."""
        run = self.folder / "local"
        with self._started(self._begin(run)) as process:
            self._reached(run, HIT)
            family = [p for p in psutil.Process(process.pid).children(recursive=True) if not _lingers(p)]
        killed = time.monotonic()
        wait_for("processes of the dead run", lambda: not [p for p in family if p.is_running()])
        return self._resumed(run, killed)

    def joined_driver(self) -> Fault:
        """Send SIGKILL to a driver whose cluster stays, wait until its actors have ended, and resume it."""
        run, others = self.folder / "joined", self._actors()
        with self._started(self._begin(run, self._joined)):
            self._reached(run, HIT)
        killed = time.monotonic()
        wait_for("actors of the dead driver", lambda: not self._actors() - others)
        return self._resumed(run, killed)

    def _resumed(self, run: Path, killed: float) -> Fault:
        before = len(rollout_files(run))
        with self._started(["train", "--resume", str(run)]) as process:
            goes_on = self._reached(run, before + 1)
            self._finish(process)
        return self._compare(run, killed, goes_on)

    def _reached(self, run: Path, iteration: int) -> float:
        """Wait until an iteration is on the disk, and return the time."""
        wait_for(f"iteration {iteration} of {run.name}", lambda: len(rollout_files(run)) >= iteration)
        return time.monotonic()

    def _actors(self) -> set[str]:
        return {actor.actor_id for actor in living_actors()}

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def job(self) -> Fault:
        """Send SIGKILL to the driver of a submitted job, and resume the run as a new job."""
        return self._job("job", supervisor=False)

    def supervisor(self) -> Fault:
        """Send SIGKILL to the actor that supervises a submitted job, and resume the run as a new job."""
        return self._job("supervisor", supervisor=True)

    def _job(self, name: str, supervisor: bool) -> Fault:
        run, others = self.folder / name, self._actors()
        job = self._submit(self._begin(run))
        self._reached(run, HIT)
        driver = psutil.Process(int(self._jobs.get_job_info(job).driver_info.pid))
        os.kill(_supervisor_pid() if supervisor else driver.pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for("the job to be FAILED", lambda: self._jobs.get_job_status(job) == JobStatus.FAILED)
        wait_for("the driver of the dead job", lambda: not driver.is_running())
        wait_for("actors of the dead job", lambda: not self._actors() - others)
        before = len(rollout_files(run))
        job = self._submit(["train", "--resume", str(run)])
        goes_on = self._reached(run, before + 1)
        wait_for("the end of the job", lambda: self._jobs.get_job_status(job).is_terminal())
        if (status := self._jobs.get_job_status(job)) != JobStatus.SUCCEEDED:
            raise RuntimeError(f"the resumed job is {status}: {self._jobs.get_job_logs(job)}")
        return self._compare(run, killed, goes_on)

    def _submit(self, arguments: Sequence[str]) -> str:
        return str(self._jobs.submit_job(entrypoint=shlex.join([sys.executable, "-m", "epd_ray.cli", *arguments])))


def _lingers(process: psutil.Process) -> bool:
    """Whether a process is one of Ray's agents, which take up to two minutes to end and hold nothing of the run."""
    return any("Agent" in word for word in process.cmdline()[:1])


def _supervisor_pid() -> int:
    (actor,) = actors_where([("class_name", "=", "JobSupervisor"), ("state", "=", "ALIVE")])
    return int(actor.pid)


RUN_EVENTS: dict[str, Callable[[RunBench], Fault]] = {
    "driver with its own Ray": RunBench.local_driver,
    "driver on a cluster": RunBench.joined_driver,
    "driver of a job": RunBench.job,
    "supervisor of a job": RunBench.supervisor,
}
