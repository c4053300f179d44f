"""Every command, started as a user starts it, listens on loopback alone, and so does all that it starts."""

import ipaddress
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from epd_ray.config.loading import dump_yaml
from epd_ray.evaluation.ab.make import make_page
from tests.ray_head import OWN_RAY, processes_of

UNSET = (*OWN_RAY, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED")  # what our tests and others set
SETTINGS = {
    "backbone": {"family": "simulated"},
    "rewards": {"sim": {"head": "simulated", "options": {"target": 0.4}, "num_cpus": 0.1}},
    "solver": {"intervals": 3},
    "prompts": {"validation": 8, "test": 8, "num_train": 16},
    "distill": {"enabled": False},
    "rdpo": {"iterations": 6, "prompts_per_iteration": 4, "group_size": 4, "minibatch_size": 4},
    "evaluation": {"every": 2},
    "cluster": {"rollout_actors": 1, "rollout_cpus": 0.5, "learner_actors": 1, "learner_cpus": 0.1},
}
SWEEP = {"trials": 2, "space": {"rdpo.lr": {"choice": [1e-4, 1e-2]}}}
PORTS = ("--port", "0")


def train(folder: Path) -> list[str]:
    (folder / "run.yaml").write_text(dump_yaml(SETTINGS))
    return ["train", "--config", str(folder / "run.yaml"), "--out", str(folder / "run"), "cluster.dashboard=true"]


def sweep(folder: Path) -> list[str]:
    (folder / "sweep.yaml").write_text(dump_yaml({**SETTINGS, "sweep": SWEEP}))
    return ["sweep", "--config", str(folder / "sweep.yaml"), "--out", str(folder / "sweep")]


def score(folder: Path) -> list[str]:
    return ["score", str(pictures(folder / "left")), "--heads", "simulated", "--out", str(folder / "scores")]


def ab_serve(folder: Path) -> list[str]:
    make_page(pictures(folder / "left"), pictures(folder / "right"), folder / "page", None, None, 0)
    return ["ab", "serve", str(folder / "page"), *PORTS]


def rewards_serve(folder: Path) -> list[str]:
    return ["rewards", "serve", "simulated", "--replicas", "2", *PORTS]


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a prompt")
    return folder


Listener = tuple[str, str, str]
"""A process, a protocol, and an address: what a socket waits on."""


def listeners(pid: int) -> set[Listener]:
    """The sockets of a process and of all below it that anybody could send to."""
    found = set()
    for process in processes_of(pid):
        try:
            name, sockets = called(process), process.net_connections(kind="inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for each in sockets:
            if each.status == psutil.CONN_LISTEN or (each.status == psutil.CONN_NONE and not each.raddr):
                kind = "udp" if each.status == psutil.CONN_NONE else "tcp"
                found.add((name, kind, each.laddr.ip if each.laddr else ""))
    return found


def called(process: psutil.Process) -> str:
    words = process.cmdline() or [process.name()]
    return next((Path(w).name for w in words if "ray::" in w or w.endswith((".py", "raylet", "gcs_server"))), words[0])


def is_loopback(address: str) -> bool:
    """Also of an IPv4 address that is written as one of IPv6, which Python knows only from 3.13 on."""
    return bool(address) and ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback


@pytest.mark.slow
@pytest.mark.parametrize("command", [train, sweep, score, rewards_serve, ab_serve])
def test_it_listens_on_loopback_alone(command: Callable[[Path], list[str]], tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in UNSET}
    lasting = command in (rewards_serve, ab_serve)
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "epd_ray.cli", *command(tmp_path)], env=env, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        found: set[Listener] = set()
        end = time.monotonic() + 280
        try:
            while process.poll() is None and time.monotonic() < end:
                found |= listeners(process.pid)
                if lasting and "http://127.0.0.1" in (tmp_path / "log").read_text():
                    found |= listeners(process.pid)
                    process.send_signal(signal.SIGINT)
                    lasting = False
                time.sleep(0.1)
            assert process.poll() in (0, 130), (tmp_path / "log").read_text()
        finally:
            for left in processes_of(process.pid):
                left.kill()
    (tmp_path / "sockets").write_text("".join(f"{' '.join(each)}\n" for each in sorted(found)))  # kept if it fails
    assert "logging.cc" not in (tmp_path / "log").read_text()  # no line of Ray's C++ code
    assert found
    assert not [each for each in found if not is_loopback(each[2])]
