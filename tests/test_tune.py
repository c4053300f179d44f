"""RDPO under Ray Tune as RLlib's users expect it: trials of their own actors, checkpoints, restored and changed."""

import time
from pathlib import Path

import pytest
import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, RunConfig, Tuner

from epd_ray.actors.reward_pool import RewardSpec
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.solvers.table import uniform_table

PROMPTS = [f"prompt {i}" for i in range(16)]
GOOD = RewardSpec(head="tests.sweep_fakes:PlacedHead", num_cpus=0.1)


def config(runners: int = 0, learners: int = 0) -> RDPOConfig:
    return (
        RDPOConfig()
        .solver(table=uniform_table(3, 2))
        .backbone(family="tests.sweep_fakes:PlacedBackbone", options={}, guidance_scale=1.0)
        .rollouts(prompts=PROMPTS, prompts_per_iteration=4, group_size=4, staleness=0)
        .rewards({"sim": GOOD})
        .env_runners(num_env_runners=runners, num_cpus_per_env_runner=0.25)
        .learners(num_learners=learners, num_cpus_per_learner=0.1)
        .training(minibatch_size=4)
        .debugging(seed=0, log_level="ERROR")
    )


class Look(Callback):
    """Keeps what reward actors there are at every result."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.seen.append(reward_actors())


def reward_actors() -> set[str]:
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if name.startswith("reward:")}


def wait_until_gone() -> None:
    end = time.monotonic() + 60
    while (left := reward_actors()) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < end:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]  # no actor, no placement group


def fit(space, folder: Path, name: str, iterations: int = 2, callbacks=()):
    run = RunConfig(
        name=name,
        stop={"training_iteration": iterations},
        storage_path=str(folder),
        callbacks=list(callbacks),
        checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
        verbose=0,
    )
    return Tuner(RDPO, param_space=space, run_config=run).fit()


@pytest.mark.parametrize(("runners", "learners"), [(0, 0), (0, 1), (1, 0), (2, 1)])
def test_a_trial_asks_for_all_that_it_places(runners, learners):
    """RLlib puts rollout actor i on bundle i: the trial's own bundle must be there, even if it asks for nothing."""
    request = RDPO.default_resource_request(config(runners, learners).to_dict())
    assert not request.head_bundle_is_empty
    assert request.bundles[1 : 1 + runners] == [{"CPU": 0.25}] * runners
    assert request.bundles[1 + runners :] == [{"CPU": 0.1}] * (learners + 1)  # and the reward actor


@pytest.mark.slow
def test_trials_share_a_machine_but_no_actor(small_ray, tmp_path):
    look = Look()
    found = fit(config(1, 1).training(lr=tune.grid_search([1e-3, 1e-2])), tmp_path, "grid", callbacks=[look])
    assert not found.errors and len(found) == 2
    assert len(set.union(*look.seen)) == 2  # one reward actor for each trial
    for result in found:
        metrics = result.metrics
        assert metrics["training_iteration"] == 2 and metrics["rdpo"]["losses/policy_loss"] is not None
        assert metrics["env_runners"]["episode_return_mean"] == pytest.approx(metrics["rdpo"]["reward/mean"])
        assert metrics["env_runners"]["num_env_steps_sampled_lifetime"] == 32
        assert result.checkpoint is not None
    assert {result.metrics["config"]["lr"] for result in found} == {1e-3, 1e-2}
    wait_until_gone()


@pytest.mark.slow
def test_a_trial_that_fails_leaves_no_actor_and_the_others_alone(small_ray, tmp_path):
    heads = [{"sim": GOOD}, {"sim": RewardSpec(head="tests.fakes:LateNanHead", num_cpus=0.1)}]
    found = fit({**config().to_dict(), "reward_specs": tune.grid_search(heads)}, tmp_path, "half")
    assert len(found.errors) == 1 and "not finite" in str(found.errors[0])
    assert [result.metrics["training_iteration"] for result in found if result.error is None] == [2]
    wait_until_gone()
    # The head is sound for 3 batches, an iteration has 2: restored from its first checkpoint it gets to the second.
    again = Tuner.restore(str(tmp_path / "half"), trainable=RDPO, resume_errored=True).fit()
    assert not again.errors
    for result in again:
        assert result.metrics["training_iteration"] == 2
        assert result.metrics["env_runners"]["num_env_steps_sampled_lifetime"] == 32
    wait_until_gone()


@pytest.mark.parametrize("learners", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_the_new_learning_rate(build, tmp_path, learners):
    """What PBT does: another trial's checkpoint, with other numbers in the configuration."""
    actors = (f"cluster.learner_actors={learners}",)
    first = build("rdpo.lr=1e-3", *actors)
    first.train()
    first.save_checkpoint(str(tmp_path))
    second = build("rdpo.lr=0.05", "rdpo.weight_decay=0.5", *actors)
    second.load_checkpoint(str(tmp_path))
    assert second.checksum() == first.checksum()
    before = second.distribution().parameters.clone()
    first.train(), second.train()
    groups = second.learner_group.foreach_learner(
        lambda learner: [g for o in learner._named_optimizers.values() for g in o.param_groups]
    )
    assert {(g["lr"], g["weight_decay"]) for each in groups for g in each.get()} == {(0.05, 0.5)}
    assert [algo.last.metrics["losses/learning_rate"] for algo in (first, second)] == [1e-3, 0.05]
    moved = [float((algo.distribution().parameters - before).abs().mean()) for algo in (first, second)]
    assert moved[1] > 5 * moved[0] > 0
