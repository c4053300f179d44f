"""Text encoders in an actor of their own, and what reaches actors through the runtime environment."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import ray
import torch

from epd_ray.actors.cluster import _variables
from epd_ray.actors.encoder import EncoderActor, EncoderSpec, embed_with
from epd_ray.backbones import BACKBONES
from epd_ray.config.loading import load_config
from epd_ray.drawing.sampler import baseline
from epd_ray.errors import ConfigError, ModelError
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.config import RDPOConfig, placement
from epd_ray.rdpo.session import rdpo_config
from tests.fakes import drawn
from tests.tiny_models import save_sd3

PROMPTS, SEEDS = ["a red circle", "", "a blue star", "two stars"], [1, 2, 3, 4]
APART = ("cluster.encoder_actors=1", "cluster.encoder_cpus=0.25")
ONE_ACTOR = ("cluster.rollout_actors=1", "cluster.rollout_cpus=0.25")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("models") / "sd3", t5=True)


@pytest.fixture
def tiny(build, model):
    """Builds RDPO on the tiny pipeline, with 7.0 as guidance scale."""
    own = ["backbone.family=auto", f"backbone.model={model}", "backbone.dtype=float32", "backbone.guidance_scale=7.0"]
    return lambda *overrides: build(*own, "prompts.train=shapes", "rdpo.group_size=2", *overrides)


def pictures(algo, prompts=PROMPTS):
    """With their rewards."""
    sampled, images = drawn(algo, baseline("euler", 2), prompts, SEEDS[: len(prompts)])
    return images, sampled.reward


def held(runner):
    components = runner._runner._worker.backbone.pipeline.components
    return sorted(name for name, part in components.items() if isinstance(part, torch.nn.Module))


@pytest.mark.slow
def test_an_encoder_actor_changes_no_bit_and_survives_its_death(tiny):
    whole, apart = tiny(), tiny(*APART, *ONE_ACTOR)
    assert all(map(np.array_equal, pictures(apart), pictures(whole)))
    assert apart.env_runner_group.foreach_env_runner(held, local_env_runner=False) == [["transformer", "vae"]]
    assert len(held(whole.env_runner_group.local_env_runner)) == 5
    apart.train(), whole.train()
    assert [r.reward for r in apart.last.rollouts] == [r.reward for r in whole.last.rollouts]
    assert apart.checksum() == whole.checksum() and apart.truncated(["red " * 300]) == whole.truncated(["red " * 300])

    pid = ray.get(apart._encoder.__ray_call__.remote(lambda actor: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    unseen = ["a green square", "nothing yet"]
    assert np.array_equal(pictures(apart, unseen)[0], pictures(whole, unseen)[0])
    assert ray.get(apart._encoder.__ray_call__.remote(lambda actor: os.getpid())) != pid


def test_without_rollout_actors_and_ended_with_the_algorithm(tiny):
    apart = tiny(*APART)
    assert np.array_equal(pictures(apart)[0], pictures(tiny())[0])
    assert held(apart.env_runner_group.local_env_runner) == ["transformer", "vae"]
    assert {"rollout", "encoder", "reward sim"} == set(apart.memory())
    name = apart.config.backbone_spec.encoder
    assert ray.get_actor(name)
    apart.stop()
    with pytest.raises(ValueError, match=name):
        ray.get_actor(name)


def test_embeddings_are_the_backbones_own(small_ray, model):
    options = {"model": str(model), "dtype": "float32"}
    torch.set_num_threads(1)
    whole, actor = BACKBONES.build("auto", options), EncoderActor("auto", options, EncoderSpec())
    for prompt in ("a red circle", "", None):
        ours, theirs = actor.embed(prompt), whole.embeddings([prompt])[0]
        assert len(ours) == len(theirs) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(t.device.type == "cpu" for t in ours)
    assert actor._encoders.pipeline.transformer is None and actor._encoders.pipeline.vae is None
    with pytest.raises(ValueError, match="nobody"):
        embed_with("nobody")


def test_a_missing_model_is_the_encoders_own_error(tiny):
    with pytest.raises(ModelError, match="no directory"):
        tiny(*APART, "backbone.model=/nowhere/at/all")


def test_it_is_counted_wherever_room_is_asked_for():
    overrides = ["cluster.encoder_actors=1", "cluster.encoder_cpus=2", "cluster.encoder_gpus=0.5"]
    asked = rdpo_config(load_config(None, overrides), ["a"])
    assert placement(asked)["encoder actor"] == [{"CPU": 2.0, "GPU": 0.5}]
    assert {"CPU": 2.0, "GPU": 0.5} in RDPO.default_resource_request(asked).bundles
    without = rdpo_config(load_config(None), ["a"])
    assert placement(without)["encoder actor"] == []
    assert len(RDPO.default_resource_request(without).bundles) + 1 == len(RDPO.default_resource_request(asked).bundles)


def test_other_families_have_no_encoder_to_part_with():
    with pytest.raises(ConfigError) as raised:
        load_config(None, ["backbone.family=simulated", "cluster.encoder_actors=1"])
    (problem,) = raised.value.problems
    assert problem.startswith("cluster: encoder_actors is 1, but family 'simulated'")
    with pytest.raises(ValueError, match=r"encoder_spec.*'auto'"):
        RDPOConfig().backbone(family="simulated", options={}).actors(encoder_spec=EncoderSpec()).validate()


@pytest.mark.parametrize("wrong", ["[HF_TOKEN=hf_secret]", "hf_secret", "{HF_TOKEN: hf_secret}", "[HF_HOME, 3]"])
def test_values_in_place_of_names_are_refused_and_not_shown(wrong):
    with pytest.raises(ConfigError) as raised:
        load_config(None, [f"cluster.env={wrong}"])
    (problem,) = raised.value.problems
    assert problem.startswith("cluster.env: entry ") and "names alone" in problem and "hf_secret" not in problem


@pytest.mark.nightly
def test_a_local_ray_listens_on_loopback_alone_whatever_the_environment():
    code = (
        "import ray\n"
        "from epd_ray.actors.cluster import ray_session\n"
        "with ray_session(None):\n"
        "    print(ray.nodes()[0]['NodeManagerAddress'])\n"
    )
    bare = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare)
    assert done.stdout.splitlines()[-1] == "127.0.0.1"


def test_what_a_submitted_job_has_already_is_not_given_twice(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "one")
    monkeypatch.setenv("HF_HOME", "two")
    monkeypatch.delenv("ABSENT", raising=False)
    assert _variables(["HF_TOKEN", "HF_HOME", "ABSENT"]) == {"HF_TOKEN": "one", "HF_HOME": "two"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"HF_TOKEN": "one"}}}')
    assert _variables(["HF_TOKEN", "HF_HOME"]) == {"HF_HOME": "two"}
