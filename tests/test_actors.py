"""Actors whose processes die or never start, what a cluster without room says, and a token that stays out of logs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from epd_ray import actors as module
from epd_ray.actors import RewardPool, RewardSpec
from epd_ray.cluster import require_room
from epd_ray.encoder import EncoderSpec, embed_with, start_encoder
from epd_ray.errors import ModelError, PlacementError
from epd_ray.rdpo import pipeline
from epd_ray.rewards.simulated import SimulatedHead

PLANTED = "hf_planted_token_value"


class Dying(SimulatedHead):
    """A head that takes its process with it, where `when` says so; "once" leaves a file behind."""

    def __init__(self, *, when: str, file: str = "") -> None:
        super().__init__()
        self.when = when
        if when == "build" or (when == "once" and not Path(file).exists()):
            Path(file or os.devnull).touch()
            os._exit(1)

    def score(self, images, prompts):  # type: ignore[no-untyped-def]
        if self.when == "score":
            os._exit(1)
        return super().score(images, prompts)


class DyingEncoders:
    """In place of a backbone."""

    def embeddings(self, prompts):  # type: ignore[no-untyped-def]
        os._exit(1)


def pool_of(**options: str) -> RewardPool:
    spec = RewardSpec(head="tests.test_actors:Dying", options=options)
    return RewardPool({"frail": spec}, f"t{time.monotonic_ns()}")


@pytest.mark.timeout(120)
def test_a_head_that_dies_while_loading_is_named(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    pool = pool_of(when="build")
    with pytest.raises(ModelError, match="reward head 'frail': its process died 2 times while loading: out of memory"):
        pool.wait_ready()
    pool.stop()


@pytest.mark.timeout(120)
def test_a_head_that_dies_once_while_loading_is_loaded_again(small_ray: None, tmp_path: Path) -> None:
    pool = pool_of(when="once", file=str(tmp_path / "died"))
    pool.wait_ready()
    assert (tmp_path / "died").exists()
    pool.stop()


@pytest.mark.timeout(120)
def test_a_head_that_dies_over_every_score_ends_the_run(build, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pipeline, "MAX_LOSSES", 2)
    algo = build("rewards={frail: {head: 'tests.test_actors:Dying', options: {when: score}}}")
    with pytest.raises(ModelError, match=r"failed 2 times, last with reward head 'frail' lost.*out of memory"):
        algo.train()


@pytest.mark.timeout(120)
def test_a_head_killed_once_changes_nothing(build) -> None:  # type: ignore[no-untyped-def]
    calm, hit = build(), build("rewards.sim.options={latency: 0.05}")
    calm.train(), calm.train()
    hit.train()
    (actor,) = hit._rewards.pools["sim"].actors
    os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    hit.train()
    assert hit.checksum() == calm.checksum()
    assert hit._rewards.pools["sim"].actors == [actor]  # restarted, and loaded again


@pytest.mark.timeout(120)
def test_encoders_that_die_over_a_prompt_are_named(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    name = f"encoder{time.monotonic_ns()}"
    actor = start_encoder(name, "tests.test_actors:dying_encoders", {}, EncoderSpec())
    with pytest.raises(ModelError, match="the text encoders: its process died 2 times while embedding 'a prompt'"):
        embed_with(name)("a prompt")
    ray.kill(actor)


def dying_encoders(*, parts: str, device: str, offload: str) -> DyingEncoders:
    return DyingEncoders()


@pytest.mark.timeout(120)
def test_an_environment_that_cannot_be_set_up_is_one_line(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runtime_env", lambda python: {"conda": "no_such_environment"})
    pool = RewardPool({"own": RewardSpec(head="simulated", python="any")}, f"t{time.monotonic_ns()}")
    with pytest.raises(ModelError, match="reward head 'own': its environment cannot be set up: ") as caught:
        pool.wait_ready()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    pool.stop()


def test_what_is_asked_for_is_counted_by_kind(small_ray: None) -> None:
    large, small = {"CPU": 50.0, "GPU": 0.2}, {"CPU": 50.0, "GPU": 0.1}
    with pytest.raises(PlacementError) as caught:
        require_room({"reward actors": [large, small, large], "learner": [{}]}, timeout_s=0.5)
    counted = "(reward actors: 2 x 50 CPU, 0.2 GPU and 1 x 50 CPU, 0.1 GPU; learner: 1 x nothing)"
    assert str(caught.value).endswith(counted)


LOCAL = """
import os, ray
from pathlib import Path
from epd_ray.environments import runtime_env
from epd_ray.session import ray_session
with ray_session(None):
    @ray.remote(num_cpus=0)
    class Witness:
        def see(self):
            return os.environ.get("HF_TOKEN")
    own = {"env_vars": {"PYTHONPATH": ""}}
    print(ray.get([Witness.remote().see.remote(), Witness.options(runtime_env=own).remote().see.remote()]))
    print(ray._private.worker._global_node.get_session_dir_path())
"""


def test_a_token_reaches_local_actors_and_no_log() -> None:
    env = {**os.environ, "HF_TOKEN": PLANTED}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, check=True, env=env)
    seen, session = done.stdout.splitlines()[-2:]
    assert seen == str([PLANTED, PLANTED])
    assert_absent(Path(session))


def assert_absent(folder: Path) -> None:
    """The planted token is in no file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []
