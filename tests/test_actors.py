"""Actors whose processes die or never start, what a cluster without room says, and a token that stays out of logs."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from epd_ray.actors import pipeline, waiting
from epd_ray.actors import reward_pool as module
from epd_ray.actors.cluster import BrokenGpuError, require_room
from epd_ray.actors.encoder import EncoderSpec, embed_with, start_encoder
from epd_ray.actors.reward_pool import RewardPool, RewardSpec
from epd_ray.config.services import ClusterConfig
from epd_ray.errors import ConfigError, ModelError, PlacementError, TaskError
from epd_ray.evaluation.suites import feature_pool
from epd_ray.evaluation.suites.feature_pool import FeaturePool, FeatureSpec
from epd_ray.score.inputs import read_index
from epd_ray.score.pipeline import scored

PLANTED = "hf_planted_token_value"


def pool_of(**options: str) -> RewardPool:
    spec = RewardSpec(head="tests.frail:Dying", options=options)
    return RewardPool({"frail": spec}, f"t{time.monotonic_ns()}")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_head_that_dies_while_loading_is_named(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    pool = pool_of(when="build")
    with pytest.raises(ModelError, match=r"frail.*2 times.*loading"):
        pool.wait_ready()
    pool.stop()


@pytest.mark.timeout(120)
def test_of_several_heads_that_cannot_be_built_one_is_said(small_ray: None, caplog: pytest.LogCaptureFixture) -> None:
    gc.collect(), caplog.clear()  # errors of earlier modules on the same Ray
    specs = {name: RewardSpec(head="simulated", options={"no": "such"}) for name in ("one", "two")}
    pool = RewardPool(specs, f"t{time.monotonic_ns()}")
    with pytest.raises(ConfigError, match=r"reward head 'simulated': .*'no'"):
        pool.wait_ready()
    for actor in pool.actors:
        with pytest.raises(ray.exceptions.RayTaskError):
            ray.get(actor.ready.remote())  # by then their first answers are in
    gc.collect()
    pool.stop()
    assert not caplog.records  # Ray calls what nobody asked for "unhandled", with a traceback


@pytest.mark.nightly
@pytest.mark.timeout(120)
def test_a_head_that_dies_once_while_loading_is_loaded_again(small_ray: None, tmp_path: Path) -> None:
    pool = pool_of(when="once", file=str(tmp_path / "died"))
    pool.wait_ready()
    assert (tmp_path / "died").exists()
    pool.stop()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_head_that_dies_over_every_score_ends_the_run(build, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pipeline, "MAX_LOSSES", 2)
    algo = build("rewards={frail: {head: 'tests.frail:Dying', options: {when: score}}}")
    with pytest.raises(ModelError, match=r"2 times.*'frail'"):
        algo.train()


@pytest.mark.timeout(120)
def test_a_head_killed_once_changes_nothing(build) -> None:  # type: ignore[no-untyped-def]
    calm, hit = build(), build("rewards.sim.replicas=1", "rewards.sim.options={latency: 0.05}")
    calm.train(), calm.train()
    hit.train()
    (actor,) = hit._rewards.pools["sim"].actors
    os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    hit.train()
    assert hit.checksum() == calm.checksum()
    assert hit._rewards.pools["sim"].actors == [actor]  # restarted, and loaded again


@pytest.mark.nightly
@pytest.mark.timeout(120)
def test_encoders_that_die_over_a_prompt_are_named(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    name = f"encoder{time.monotonic_ns()}"
    actor = start_encoder(name, "tests.frail:dying_encoders", {}, EncoderSpec())
    with pytest.raises(ModelError, match=r"text encoders.*2 times.*'a prompt'"):
        embed_with(name)("a prompt")
    ray.kill(actor)


@pytest.mark.timeout(120)
def test_an_environment_that_cannot_be_set_up_is_one_line(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runtime_env", lambda python: {"conda": "no_such_environment"})
    pool = RewardPool({"own": RewardSpec(head="simulated", python="any")}, f"t{time.monotonic_ns()}")
    with pytest.raises(ModelError, match=r"'own'.*environment") as caught:
        pool.wait_ready()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    pool.stop()


# -- silent actors ----------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 0.2)


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_a_head_that_never_loads_is_said_and_ends_the_run(
    small_ray: None, impatient: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = RewardSpec(head="tests.frail:Dying", options={"when": "never"})
    pool = RewardPool({"frail": spec}, f"t{time.monotonic_ns()}", timeout_s=0.1)
    with pytest.raises(ModelError, match=r"frail.*no answer in 0.4 s.*loading.*task_timeout_s"):
        pool.wait_ready()
    assert "for reward head 'frail' (loading)" in caplog.text
    pool.stop()


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_encoders_that_hang_are_named(small_ray: None, impatient: None) -> None:
    name = f"encoder{time.monotonic_ns()}"
    actor = start_encoder(name, "tests.frail:hanging_encoders", {}, EncoderSpec())
    with pytest.raises(ModelError, match=r"text encoders.*no answer in .*'a prompt'"):
        embed_with(name, timeout_s=2.0)("a prompt")
    ray.kill(actor)


@pytest.mark.timeout(120)
def test_an_extractor_that_hangs_is_named(
    small_ray: None, impatient: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feature_pool, "RETRIES", 1)
    spec = FeatureSpec("tests.frail:HangingExtractor", num_cpus=0.25)
    with FeaturePool(spec, ClusterConfig(task_timeout_s=30.0)) as pool:
        pool._timeout_s = 0.3  # once it is loaded
        with pytest.raises(ModelError, match=r"HangingExtractor.*gave no answer in time 2 times over batch 1 of 1"):
            pool.features(np.zeros((2, 3, 1, 1), np.uint8))
    assert "HangingExtractor' (batch 1 of 1)" in caplog.text


# -- broken GPUs ------------------------------------------------------------------------------------------------------

ALWAYS = 1000


def breaking(kind: str, file: Path, times: int) -> list[str]:
    """Overrides: a rollout actor or a head of that kind."""
    options = f"{{file: {file}, times: {times}}}"
    if kind == "head":
        return [f"rewards={{frail: {{head: 'tests.frail:BreakingHead', options: {options}}}}}"]
    return [
        *("backbone.family=tests.frail:BreakingBackbone", f"backbone.options={options}"),
        *("cluster.rollout_actors=1", "cluster.rollout_cpus=0.25"),
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["head", pytest.param("backbone", marks=pytest.mark.slow)])
def test_a_gpu_that_breaks_once_changes_nothing(build, tmp_path: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    calm, hit = build(), build(*breaking(kind, tmp_path / "processes", times=1))
    calm.train(), hit.train()
    assert hit.checksum() == calm.checksum()
    first, *others = (tmp_path / "processes").read_text().split()
    assert others and first not in others and str(os.getpid()) not in others


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "who"),
    [
        pytest.param("head", "actor 1 of reward head 'frail'", marks=pytest.mark.slow),
        pytest.param("backbone", "rollout actor 1", marks=pytest.mark.nightly),
    ],
    ids=["head", "backbone"],
)
def test_a_gpu_that_always_breaks_ends_the_run_in_its_own_words(build, tmp_path: Path, kind: str, who: str) -> None:  # type: ignore[no-untyped-def]
    algo = build(*breaking(kind, tmp_path / "processes", ALWAYS))
    with pytest.raises(TaskError, match=f"^{who}.* 3 ") as caught:
        algo.train()
    assert "CUDA error: no kernel image is available Compile with" in str(caught.value)
    assert "\n" not in str(caught.value)
    processes = (tmp_path / "processes").read_text().split()
    assert len(set(processes)) == len(processes) >= 3


def test_a_driver_that_breaks_its_gpu_ends_at_once_in_its_own_words(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    algo = build(*breaking("backbone", tmp_path / "processes", ALWAYS), "cluster.rollout_actors=0")
    with pytest.raises(BrokenGpuError, match="CUDA error: no kernel image"):
        algo.train()
    assert (tmp_path / "processes").read_text().split() == [str(os.getpid())]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_encoders_and_extractors_get_a_new_gpu_process_too(small_ray: None, tmp_path: Path) -> None:
    def options(name: str, times: int) -> dict[str, object]:
        return {"file": str(tmp_path / name), "times": times}

    for times in (1, ALWAYS):
        name, target = f"encoder{time.monotonic_ns()}", "tests.frail:BreakingEncoders"
        actor = start_encoder(name, target, options(f"encoder {times}", times), EncoderSpec())
        spec = FeatureSpec("tests.frail:BreakingExtractor", options(f"extractor {times}", times), num_cpus=0.25)
        with FeaturePool(spec, ClusterConfig()) as pool:
            if times == 1:
                assert len(embed_with(name)("a prompt")) == 1
                assert pool.features(np.zeros((2, 3, 1, 1), np.uint8)).shape == (2, 1)
            else:
                with pytest.raises(ModelError, match=r"text encoders.*CUDA error.*'a"):
                    embed_with(name)("a prompt")
                with pytest.raises(BrokenGpuError, match=r"^CUDA error: no kernel image"):
                    pool.features(np.zeros((2, 3, 1, 1), np.uint8))
        ray.kill(actor)
        for of in ("encoder", "extractor"):
            assert len(set((tmp_path / f"{of} {times}").read_text().split())) == 2


@pytest.mark.nightly
def test_scores_of_pictures_survive_a_gpu_that_breaks_once(small_ray: None, tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a prompt")
    index = read_index(str(tmp_path))
    once, always = (
        {"frail": RewardSpec("tests.frail:BreakingHead", options={"file": str(tmp_path / f"{n}"), "times": n})}
        for n in (1, ALWAYS)
    )
    assert sum(len(table) for table in scored(index, once, 4)) == 2
    with pytest.raises(ModelError, match=r"'frail'.*AcceleratorError: CUDA error"):
        list(scored(index, always, 4))


# -- words ------------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_is_counted_by_kind(small_ray: None) -> None:
    large, small = {"CPU": 50.0, "GPU": 0.2}, {"CPU": 50.0, "GPU": 0.1}
    with pytest.raises(PlacementError) as caught:
        require_room({"reward actors": [large, small, large], "learner": [{}]}, timeout_s=0.5)
    counted = "(reward actors: 2 x 50 CPU, 0.2 GPU and 1 x 50 CPU, 0.1 GPU; learner: 1 x nothing)"
    assert str(caught.value).endswith(counted)


LOCAL = """
import os, ray
from pathlib import Path
from epd_ray.actors.environments import runtime_env
from epd_ray.actors.cluster import ray_session
with ray_session(None):
    @ray.remote(num_cpus=0)
    class Witness:
        def see(self):
            return os.environ.get("HF_TOKEN")
    own = {"env_vars": {"PYTHONPATH": ""}}
    print(ray.get([Witness.remote().see.remote(), Witness.options(runtime_env=own).remote().see.remote()]))
    print(ray._private.worker._global_node.get_session_dir_path())
"""


@pytest.mark.slow
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
