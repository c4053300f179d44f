"""A Ray head of its own on loopback, as an operator would start one; everything it started ends with the context."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

READY_SECONDS, END_SECONDS = 120.0, 20.0
OWN_RAY = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: of the cluster, for ray.init.
        dashboard: URL that `ray job submit` takes.
        folder: its sessions, with their logs.
        env: of processes that may use it; the token is in there.
        pid: of `ray start`.
    """

    address: str
    dashboard: str
    folder: Path
    env: dict[str, str]
    pid: int


@contextmanager
def ray_head(
    *options: str, token: str | None = None, num_cpus: int = 4, env: Mapping[str, str] | None = None
) -> Iterator[Head]:
    """Start `ray start --head` and wait until it takes jobs.

    Args:
        options: more of `ray start`.
        token: that everybody must show; None: no authentication.
        num_cpus: to give away, however many there are.
        env: more variables of the head.
    """
    folder = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))  # short: sockets live below it
    gcs, dashboard, metrics, client, agent = free_ports(5)
    mine = clean_env() | (token_env(token, folder) if token else {"RAY_AUTH_MODE": "disabled"})
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--num-cpus={num_cpus}", f"--temp-dir={folder}", *options]
    log = folder / "start.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**mine, **(env or {})}, start_new_session=True)
    try:
        head = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", folder, mine, process.pid)
        _wait_until_ready(process, [gcs, dashboard, agent], log)
        yield head
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def clean_env() -> dict[str, str]:
    """This process's environment without what points at another Ray, and with Ray on loopback alone."""
    env = {name: value for name, value in os.environ.items() if name not in OWN_RAY}
    return {**env, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def token_env(token: str, folder: Path) -> dict[str, str]:
    """The variables of somebody who has the token in a file."""
    path = folder / "auth_token"
    path.write_text(token)
    path.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def processes_of(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def listening(processes: Sequence[psutil.Process]) -> list[tuple[str, int]]:
    """Address and port of every TCP socket on which these wait for connections."""
    found = []
    for process in processes:
        try:
            connections = process.net_connections(kind="tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found += [(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def _wait_until_ready(process: "subprocess.Popen[bytes]", ports: Sequence[int], log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    waiting = list(ports)
    while waiting:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the head did not come up:\n{log.read_text()}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", waiting[0])) == 0:
                waiting.pop(0)
                continue
        time.sleep(0.2)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the head, then the end of whatever of its processes is left."""
    started = processes_of(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(started, timeout=END_SECONDS)
    for one in left:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=END_SECONDS)
    process.wait(timeout=END_SECONDS)
