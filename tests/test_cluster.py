"""Joining a cluster or a Ray of one's own: what is said when it cannot be, who can reach it, which secrets stay."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from platform import python_version

import psutil
import pytest
import ray
import torch
from PIL import Image
from ray._private import services

from epd_ray.actors import address as join
from epd_ray.actors import cluster
from epd_ray.actors.address import reachable
from epd_ray.actors.cluster import BrokenGpuError, start_ray
from epd_ray.actors.configured import run_session
from epd_ray.actors.quiet import silent_start
from epd_ray.config.loading import load_config
from epd_ray.config.services import ClusterConfig
from epd_ray.errors import ClusterError, ConfigError, ModelError
from epd_ray.evaluation.suites.feature_pool import FeaturePool, FeatureSpec
from epd_ray.rdpo import session
from epd_ray.score.pipeline import ScoreRequest, score
from tests.fakes import Quiet
from tests.ray_head import Head, clean_env, free_ports, listening, processes_of, ray_head, token_env

ROOT = Path(__file__).parent.parent
TOKEN, OTHER = "a1" * 16, "b2" * 16
REACH = """
import sys
from epd_ray.errors import ClusterError
from epd_ray.actors.address import reachable
try:
    print("reached", reachable(sys.argv[1] or None))
except ClusterError as error:
    print(error)
"""


def reach(address: str, **env: str) -> str:
    """What a process of its own is told, as Ray reads its token but once."""
    command = [sys.executable, "-c", REACH, address]
    whole = {**clean_env(), "PYTHONPATH": str(ROOT), "RAY_BACKEND_LOG_LEVEL": "fatal", **env}
    done = subprocess.run(command, capture_output=True, text=True, env=whole, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert TOKEN not in done.stdout + done.stderr and OTHER not in done.stdout + done.stderr
    return line


def test_ray_starts_without_its_line_about_the_log_level(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def connect(*said: str) -> int:
        os.write(2, "".join(f"{line}\n" for line in said).encode())
        return 7

    monkeypatch.setattr(ray._raylet, "CoreWorker", connect)
    line = "[2026-11-30 I 1 1] logging.cc:303: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3"
    with silent_start():
        assert ray._raylet.CoreWorker("before", line, "after") == 7
        os.write(2, b"meanwhile\n")
    assert ray._raylet.CoreWorker is connect
    assert capfd.readouterr().err == "before\nafter\nmeanwhile\n"


# -- no cluster there -------------------------------------------------------------------------------------------------


def test_no_ray_at_the_address_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "CONNECT_SECONDS", 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    (port,) = free_ports(1)
    with pytest.raises(ClusterError) as caught:
        start_ray(f"127.0.0.1:{port}")
    said = str(caught.value)
    assert f"127.0.0.1:{port} (cluster.address) within 1 s" in said and "leave cluster.address out" in said
    assert "RAY_AUTH_MODE=token ray start --head" in said and "get-auth-token --generate" in said and "\n" not in said
    for address in (None, "auto"):
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(ClusterError, match=rf"127.0.0.1:{port} \(RAY_ADDRESS\)"):
            start_ray(address)


def test_auto_without_a_ray_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())  # of others who use this machine
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(ClusterError, match=r"auto.*cluster.address"):
        start_ray("auto")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "http://127.0.0.1:8265",
            "is the address of a dashboard: submit a job to it by `ray job submit --address",
        ),
        ("ray://127.0.0.1:10001", "is the address of a Ray Client server, which runs cannot use"),
        ("nonsense", r"nonsense \(cluster.address\) is not an address: give host:port"),
    ],
)
def test_what_is_no_address_of_a_head(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=message) as caught:
        reachable(address)
    assert "\n" not in str(caught.value)


def test_no_address_means_a_ray_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", told)
        assert reachable(None) is None
    assert reachable("local") is None


# -- tokens and versions ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(token=TOKEN) as started:
        yield started


@pytest.mark.slow
def test_the_right_token_opens_the_cluster(head: Head) -> None:
    own = {name: head.env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    assert reach(head.address, **own) == f"reached {head.address}"
    assert reach("", RAY_ADDRESS=head.address, **own) == f"reached {head.address}"


@pytest.mark.slow
def test_another_port_of_ray_is_told_from_the_head(head: Head) -> None:
    """The head's node has a gRPC server of its own, as every node."""
    own = {name: head.env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    raylets = [process for process in processes_of(head.pid) if process.name() == "raylet"]
    said = [reach(f"127.0.0.1:{port}", **own) for _, port in listening(raylets)]
    assert any(
        re.match(r"127.0.0.1:\d+ \(cluster.address\) answers, but is not a Ray head: give the port", s) for s in said
    )
    assert not [line for line in said if line.startswith("reached")]


@pytest.mark.slow
def test_a_wrong_or_missing_token_is_named_and_never_shown(head: Head, tmp_path: Path) -> None:
    wrong = reach(head.address, **token_env(OTHER, tmp_path))
    assert wrong.startswith(f"{head.address} (cluster.address) asks for its token and got another one: export")
    unset = reach(head.address, HOME=str(tmp_path))
    assert unset.startswith(f"{head.address} (cluster.address) asks for its token and got none: export RAY_AUTH")
    nowhere = reach(head.address, RAY_AUTH_MODE="token", HOME=str(tmp_path))
    assert nowhere.startswith(f"no token for {head.address} (cluster.address), though RAY_AUTH_MODE=token: export")
    path = reach(head.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="/no/such/file")
    assert path.startswith(
        f"no token for {head.address} (cluster.address) in /no/such/file (RAY_AUTH_TOKEN_PATH): export"
    )
    for line in (wrong, unset, nowhere, path):
        assert "RAY_AUTH_TOKEN_PATH" in line and "ray get-auth-token --generate" in line


PRETEND = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_put(b"CLUSTER_METADATA", sys.argv[2].encode(), True, b"cluster")
"""


@pytest.mark.parametrize(
    ("key", "name", "ours"),
    [
        pytest.param("ray_version", "Ray", ray.__version__, marks=pytest.mark.slow),
        pytest.param("python_version", "Python", python_version(), marks=pytest.mark.nightly),
    ],
)
def test_another_version_is_refused(head: Head, key: str, name: str, ours: str) -> None:
    own = {n: head.env[n] for n in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    real = {"ray_version": ray.__version__, "python_version": python_version()}
    for stored, line in (
        (
            real | {key: "2.1.0"},
            f"{head.address} (cluster.address) runs {name} 2.1.0, this machine {ours}: install the same",
        ),
        (real, f"reached {head.address}"),
    ):
        command = [sys.executable, "-c", PRETEND, head.address, json.dumps(stored)]
        subprocess.run(command, env=head.env, check=True, timeout=120)
        assert reach(head.address, **own).startswith(line)


# -- what a job brings ------------------------------------------------------------------------------------------------


def test_a_jobs_own_setup_hook_is_a_clear_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.JOB_CONFIG, '{"runtime_env": {"worker_process_setup_hook": "mine.hook"}}')
    monkeypatch.setenv("HF_TOKEN", OTHER)
    with pytest.raises(ClusterError, match=r"worker_process_setup_hook.*cluster.env=\[\]") as caught:
        cluster._variables(["HF_TOKEN"])
    assert OTHER not in str(caught.value)
    assert cluster._variables([]) == {}


# -- a local Ray ------------------------------------------------------------------------------------------------------

LOCAL = """
import sys
import ray
from epd_ray.actors.cluster import ray_session
with ray_session(None, dashboard=sys.argv[1] == "dashboard"):
    ray.get(ray.remote(lambda: 1).remote())
    print(ray._private.worker._global_node.webui_url or "none", flush=True)
    input()
"""


@pytest.mark.parametrize(
    "dashboard",
    [pytest.param("dashboard", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.nightly)],
)
def test_a_local_ray_listens_on_loopback_alone(dashboard: str) -> None:
    env = {**clean_env(), "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")  # as an ordinary user has it
    with subprocess.Popen(
        [sys.executable, "-c", LOCAL, dashboard],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        me = psutil.Process(process.pid)
        sockets = listening([me, *me.children(recursive=True)])
        process.stdin.write("\n")
        process.stdin.close()
        said = process.stderr.read()
        assert process.wait(timeout=600) == 0, said
    assert len(sockets) >= 3
    assert {ip for ip, _ in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    if dashboard == "none":
        assert url == "none" and "dashboard" not in said
    else:
        assert url.startswith("127.0.0.1:") and int(url.rpartition(":")[2]) in {port for _, port in sockets}
        assert f"The dashboard is at http://{url}" in said


UV = """
import sys
import ray
from ray._private.runtime_env import uv_runtime_env_hook
from epd_ray.actors.cluster import ray_session
uv_runtime_env_hook._get_uv_run_cmdline = lambda: ["uv", "run", "epd-ray"]
with ray_session(None):
    print(ray.get(ray.remote(lambda: sys.executable).remote()) == sys.executable)
"""


@pytest.mark.slow
def test_a_local_ray_starts_under_uv_and_with_a_long_temporary_directory(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 10)
    long.mkdir()
    env = {**clean_env(), "PYTHONPATH": str(ROOT), "TMPDIR": str(long)}
    env.pop("RAY_TMPDIR", None)
    done = subprocess.run(
        [sys.executable, "-c", UV], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr
    assert str(long) in done.stderr and "/tmp/ray" in done.stderr and not (long / "ray").exists()


def test_an_actor_that_asks_for_no_gpu_sees_none(small_ray: None) -> None:
    class Actor:
        def seen(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    own = {"env_vars": {"PYTHONPATH": ""}}  # as a head's own environment has it
    actors = ray.remote(Actor).remote(), ray.remote(Actor).options(runtime_env=own).remote()
    assert ray.get([actor.seen.remote() for actor in actors]) == ["", ""]


SEEN = """
import os, sys
import ray
from epd_ray.actors.cluster import ray_session
with ray_session(sys.argv[1]):
    print(ray.get(ray.remote(lambda: os.environ.get("CUDA_VISIBLE_DEVICES")).remote()) == "")
"""


def test_a_ray_that_does_not_start_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="within 30 s"):
        start_ray(env=[])


@pytest.mark.slow
def test_a_cluster_hides_them_too(head: Head) -> None:
    env = {name: value for name, value in head.env.items() if name not in cluster.HIDE_GPUS}
    command = [sys.executable, "-c", SEEN, head.address]
    done = subprocess.run(command, capture_output=True, text=True, env={**env, "PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_a_job_has_its_own_word_on_hidden_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(join, "reachable", lambda address: address)
    monkeypatch.setattr(ray, "init", lambda **given: asked.append(given["runtime_env"]["env_vars"]))
    start_ray("127.0.0.1:1", env=[])
    (name,) = cluster.HIDE_GPUS
    monkeypatch.setenv(cluster.JOB_CONFIG, json.dumps({"runtime_env": {"env_vars": {name: "0"}}}))
    start_ray("127.0.0.1:1", env=[])
    assert asked == [{name: "1"}, {}]


MINE = """
import logging, ray
from epd_ray.actors import cluster
from epd_ray.actors.cluster import ray_session
ray.init("local", num_gpus=2, num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")
with ray_session(None):
    cluster.warn_of_idle_gpus({"cluster.rollout_gpus": 0.0})
"""


@pytest.mark.slow
def test_nothing_is_said_of_gpus_that_are_not_hidden(
    small_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    env = {**clean_env(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MINE], capture_output=True, text=True, env=env, check=True)
    assert "GPUs" not in done.stderr
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    cluster.warn_of_idle_gpus({"cluster.rollout_gpus": 0.0, "cluster.encoder_gpus": 0.5})  # on a Ray of ours
    assert caplog.messages == [
        "the cluster has 2 GPUs, but actors that ask for none run on CPU cores: set cluster.rollout_gpus"
    ]


BIG = ("backbone.model=owner/name", "rewards={web: {head: http, options: {url: 'http://a/score'}}}")
OWN = ("backbone.family=tests.fakes:TableBackbone", "rewards={clip: {options: {model: shapes-clip}}}")


@pytest.mark.parametrize(
    ("overrides", "forgotten"),
    [
        (BIG, ["cluster.rollout_gpus"]),
        (OWN, ["cluster.rollout_gpus"]),
        ((*OWN, "cluster.rollout_actors=0"), []),
        (("rewards={pick: {head: pickscore, replicas: 0}}",), []),
        ((*BIG, "cluster.encoder_actors=1"), ["cluster.rollout_gpus", "cluster.encoder_gpus"]),
        ((*BIG, "cluster.rollout_gpus=1", "cluster.encoder_actors=1", "cluster.encoder_gpus=0.2"), []),
        (("rewards={pick: {head: pickscore}}",), ["rewards.pick.num_gpus"]),  # on the embedded model
        (("backbone.family=simulated", "rewards={sim: {head: simulated}}"), []),
    ],
)
def test_whoever_could_use_a_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...], forgotten: list[str]
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0})
    session._warn_of_idle_gpus(load_config(None, overrides))
    assert [m.rpartition(": set ")[2] for m in caplog.messages] == [", ".join(forgotten)] * bool(forgotten)


@pytest.mark.slow
def test_extractors_and_scores_on_the_cpu_are_mentioned(
    small_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0})
    with pytest.raises(ModelError, match="no directory"):
        FeaturePool(FeatureSpec("clip", {"model": "./nowhere"}, num_cpus=0), ClusterConfig())
    FeaturePool(FeatureSpec("clip", {"model": "shapes-clip"}, num_cpus=0), ClusterConfig()).stop()  # needs none
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a prompt")
    asked = load_config(None, ["rewards={mine: {head: 'tests.fakes:FlatHead'}}"])
    score(ScoreRequest(str(tmp_path), tmp_path / "scores"), asked, Quiet())
    fixes = [m.rpartition(": set ")[2] for m in caplog.messages if ": set " in m]  # not those about slow loading
    assert fixes == ["cluster.feature_gpus", "rewards.mine.num_gpus"]


@pytest.mark.slow
def test_an_actor_with_a_broken_gpu_makes_room_for_another(small_ray: None, tmp_path: Path) -> None:
    class Actor:
        def draw(self, error: BaseException | None = None, cause: BaseException | None = None) -> int:
            with cluster.end_if_broken():
                if error is not None:
                    raise error from cause
                return os.getpid()

    broken = torch.AcceleratorError("CUDA error: an illegal memory access\nwas encountered")
    actor = ray.remote(Actor).options(max_restarts=-1, max_task_retries=1).remote()
    first = ray.get(actor.draw.remote())
    with pytest.raises(ValueError, match="of another kind"):
        ray.get(actor.draw.remote(ValueError("of another kind")))
    assert ray.get(actor.draw.remote()) == first
    with pytest.raises(BrokenGpuError, match="illegal memory access"):
        ray.get(actor.draw.remote(broken))
    second = ray.get(actor.draw.remote())
    with pytest.raises(BrokenGpuError, match="in a head"):
        ray.get(actor.draw.remote(ValueError("in a head"), broken))
    assert len({first, second, ray.get(actor.draw.remote())}) == 3
    hasty = ray.remote(Actor).options(max_restarts=-1).remote()
    error, behind = hasty.draw.remote(broken), hasty.draw.remote()
    with pytest.raises(
        BrokenGpuError, match="CUDA error"
    ):  # though the next call, which ends the process, waited there
        ray.get(error)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(behind)
    for _ in "twice":  # in no actor, nothing ends
        with pytest.raises(BrokenGpuError, match="CUDA error"):
            Actor().draw(broken)


# -- a full object store ----------------------------------------------------------------------------------------------

SMALL = ["backbone.family=simulated", "rewards={sim: {head: simulated}}", "distill.enabled=false"]
SMALL += ["solver.intervals=3", "rdpo.iterations=1", "prompts.validation=8", "prompts.test=2", "evaluation.pictures=1"]
SMALL += ["cluster.rollout_actors=1", "cluster.learner_actors=0"]
FILL = """
import sys
import numpy as np
import ray
ray.init(address=sys.argv[1], logging_level="ERROR")
kept = []
try:
    while len(kept) < 1000:
        kept.append(ray.put(np.zeros(1 << 22, np.uint8)))
except ray.exceptions.OutOfDiskError:
    print("full", flush=True)
    input()
"""


@pytest.mark.slow
def test_a_full_object_store_ends_the_run_with_a_line(tmp_path: Path) -> None:
    """Another driver has filled 80 MB, on a node whose disk counts as full at 0.01 %.

    However full that is, Ray's workers for it would make room by and by: there are none.
    """
    full = {"RAY_local_fs_capacity_threshold": "0.0001", "RAY_max_io_workers": "0"}
    with ray_head("--object-store-memory=80000000", env=full) as node:
        env = {**node.env, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": node.address}
        fill = [sys.executable, "-c", FILL, node.address]
        with subprocess.Popen(fill, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as other:
            assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "full\n"
            command = [sys.executable, "-m", "epd_ray.cli", "train", "--out", str(tmp_path / "run"), *SMALL]
            command += ["backbone.options={size: 512}", "cluster.images_per_job=8"]
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=800, check=False)
            other.stdin.close()
    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: the object store on node 127.0.0.1 has no room for 6 MiB of images, in memory or on disk"
    )
    assert "--object-store-memory, or lower rdpo.staleness" in last and "Traceback" not in done.stderr


# -- the user's own modules -------------------------------------------------------------------------------------------

SHIPPED = """
import os, shutil, sys
import ray
from epd_ray.actors.cluster import start_ray
from epd_ray.actors.modules import importable
start_ray(sys.argv[1], modules=importable(sys.argv[2:]))
os.remove(sys.argv[2])  # other nodes do not have them either
shutil.rmtree(sys.argv[3])

@ray.remote(num_cpus=0.5)
def where():
    import lone_head, whole_package.head
    return lone_head.__file__, whole_package.head.__file__

print(*ray.get(where.remote()), sep="\\n")
"""


@pytest.mark.slow
def test_own_modules_are_copied_to_the_nodes_of_a_cluster(head: Head, tmp_path: Path) -> None:
    (tmp_path / "lone_head.py").write_text("")
    (tmp_path / "whole_package").mkdir()
    for name in ("__init__", "head"):
        (tmp_path / "whole_package" / f"{name}.py").write_text("")
    env = {**head.env, "PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": TOKEN}
    command = [sys.executable, "-c", SHIPPED, head.address, "lone_head.py", str(tmp_path / "whole_package")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    copies = [Path(line) for line in done.stdout.splitlines()]
    assert [copy.name for copy in copies] == ["lone_head.py", "head.py"]
    assert not [copy for copy in copies if tmp_path in copy.parents]


@pytest.mark.parametrize("name", ["missing.py", "notes.txt"])
def test_a_module_that_is_not_there_is_named_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.setattr(cluster, "start_ray", pytest.fail)
    config = load_config(None, [f"cluster.py_modules=[{tmp_path / name}]"])
    with pytest.raises(ConfigError, match=rf"^cluster\.py_modules: .*{re.escape(name)}"), run_session(config):
        pass


def test_modules_of_a_job_and_of_the_configuration_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.JOB_CONFIG, json.dumps({"runtime_env": {"py_modules": ["gcs://a.zip"]}}))
    monkeypatch.setattr("epd_ray.actors.address.reachable", lambda address: "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", pytest.fail)
    with pytest.raises(ConfigError, match="py_modules of its own"):
        cluster.start_ray("127.0.0.1:1", modules=("/mine.py",))


# -- secrets ----------------------------------------------------------------------------------------------------------

PLANTED = {"HF_TOKEN": "hf_planted_value", "WANDB_API_KEY": "wandb_planted_value", "MY_TOKEN": "my_planted_value"}


@pytest.mark.slow
def test_no_planted_secret_stays_in_a_run_or_in_rays_logs(tmp_path: Path) -> None:
    with ray_head(token=TOKEN) as node:
        out = tmp_path / "run"
        command = [
            sys.executable,
            "-m",
            "epd_ray.cli",
            "train",
            "--out",
            str(out),
            *SMALL,
            "cluster.env=[HF_TOKEN, MY_TOKEN]",
        ]
        env = {**node.env, **PLANTED, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": node.address}
        env |= {"RAY_AUTH_TOKEN": TOKEN}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        secrets = [*PLANTED.values(), TOKEN]
        found = planted_in([out, *node.folder.glob("session_2*")], secrets)
        assert found == []
        assert not [secret for secret in secrets if secret in done.stdout + done.stderr]


def planted_in(folders: list[Path], secrets: list[str]) -> list[tuple[str, str]]:
    """Files below the folders that hold one of the secrets."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 30
    return [
        (str(path), s) for path in files if os.access(path, os.R_OK) for s in secrets if s.encode() in path.read_bytes()
    ]
