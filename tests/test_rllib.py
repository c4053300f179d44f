"""RLlib's surface, as somebody tries it who knows RLlib: each setting and method works, or says in one line why not."""

import numpy as np
import pytest
import ray
from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback

import epd_ray
from epd_ray.actors.reward_pool import RewardSpec
from epd_ray.config.loading import load_config
from epd_ray.errors import ConfigError
from epd_ray.prompts.splits import PromptSplits
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo import RDPO, RDPOConfig
from epd_ray.rdpo.settings import CALLBACKS, OBEYED, WITHOUT_EFFECT, instead, settings
from epd_ray.runs.stage_one import fit_start_table
from epd_ray.stage_one.shard import as_table

PROMPTS, HELD_OUT = [f"prompt {i}" for i in range(16)], ["one", "two", "three"]


def simulated() -> RDPOConfig:
    """Everything in the driver, on the backbone and head that cost nothing."""
    return (
        RDPOConfig()
        .backbone(family="simulated", options={})
        .rewards({"sim": RewardSpec("simulated", replicas=0)})
        .rollouts(prompts=PROMPTS, held_out=HELD_OUT)
        .env_runners(num_env_runners=0)
        .learners(num_learners=0)
        .debugging(seed=0, log_level="ERROR")
    )


@pytest.fixture
def started(small_ray):
    """Builds algorithms from configurations, and stops them."""
    built = []

    def start(config):
        built.append(config.build_algo())
        return built[-1]

    yield start
    for algo in built:
        algo.stop()


def test_every_setting_of_rllib_is_in_one_class():
    names, refused = set(vars(AlgorithmConfig())), set(settings())
    assert names == refused | (names & OBEYED) | (names & set(WITHOUT_EFFECT))
    assert OBEYED | set(WITHOUT_EFFECT) <= names and not OBEYED & set(WITHOUT_EFFECT)
    assert len(refused) > 150 and all(WITHOUT_EFFECT.values())


@pytest.mark.parametrize("name", settings())
def test_what_is_not_obeyed_is_refused_by_name(name):
    config = simulated()
    setattr(config, name, "something of mine")
    with pytest.raises(ConfigError) as caught:
        config.validate()
    (problem,) = caught.value.problems
    assert problem.startswith(name.lstrip("_")) and "something of mine" in problem and instead(name) in problem


@pytest.mark.parametrize(
    ("change", "name", "fix"),
    [
        (lambda c: c.environment("CartPole-v1"), "env", "rollouts"),
        (lambda c: c.training(gamma=0.9), "gamma", "discount"),
        (lambda c: c.training(train_batch_size_per_learner=64), "train_batch_size_per_learner", "group_size"),
        (lambda c: c.evaluation(evaluation_duration=3), "evaluation_duration", "held_out"),
        (lambda c: c.evaluation(evaluation_num_env_runners=1), "evaluation_num_env_runners", "held_out"),
        (lambda c: c.env_runners(sample_timeout_s=5), "sample_timeout_s", "task_timeout_s"),
        (lambda c: c.env_runners(explore=False), "explore", "policy()"),
        (lambda c: c.rl_module(model_config={"fcnet_hiddens": [8]}), "model_config", "policy()"),
        (lambda c: c.multi_agent(policies={"a", "b"}), "policies", "policy()"),
        (lambda c: c.callbacks(on_episode_end=print), "callbacks_on_episode_end", "on_train_result"),
        (lambda c: c.callbacks(on_sample_end=print), "callbacks_on_sample_end", "last.rollouts"),
        (lambda c: c.offline_data(input_="/data"), "input_", "own pictures"),
        (lambda c: c.reporting(min_time_s_per_iteration=9), "min_time_s_per_iteration", "one update"),
    ],
)
def test_the_methods_of_the_configuration_lead_to_the_same_words(change, name, fix):
    with pytest.raises(ConfigError) as caught:
        change(simulated()).validate()
    (problem,) = caught.value.problems
    assert problem.startswith(f"{name} is ") and fix in problem


def test_callbacks_that_never_fire_are_refused_by_name():
    class Mine(RLlibCallback):
        def on_train_result(self, **given):
            pass

        def on_sample_end(self, **given):
            pass

        def on_episode_start(self, **given):
            pass

    with pytest.raises(ConfigError) as caught:
        simulated().callbacks(Mine).validate()
    assert [p.split()[2] for p in caught.value.problems] == ["on_episode_start", "on_sample_end"]


def test_callbacks_fire(started, tmp_path):
    seen = []

    class Mine(RLlibCallback):
        def on_algorithm_init(self, *, algorithm, **given):
            seen.append(("on_algorithm_init", algorithm.mean_table().intervals))  # it is whole by now

        def on_train_result(self, *, algorithm, result, **given):
            seen.append(("on_train_result", len(algorithm.last.rollouts)))

        def on_evaluate_start(self, *, algorithm, **given):
            seen.append(("on_evaluate_start", algorithm.policy_version))

        def on_evaluate_end(self, *, evaluation_metrics, **given):
            seen.append(("on_evaluate_end", evaluation_metrics["env_runners"]["num_env_steps_sampled"]))

        def on_checkpoint_loaded(self, *, algorithm, **given):
            seen.append(("on_checkpoint_loaded", algorithm.policy_version))

    algo = started(simulated().callbacks(Mine))
    algo.train()
    algo.evaluate()
    algo.restore(algo.save_to_path(str(tmp_path / "checkpoint")))  # as Tune does; restore_from_path does not call it
    assert {name for name, _ in seen} == CALLBACKS
    assert seen == [
        ("on_algorithm_init", algo.config.table.intervals),
        ("on_train_result", 32),
        ("on_evaluate_start", 1),
        ("on_evaluate_end", 3),
        ("on_checkpoint_loaded", 1),
    ]


def test_evaluate_scores_the_mean_table_on_held_out_prompts(started):
    from epd_ray.drawing.sampler import Sampler

    algo, undisturbed = started(simulated().evaluation(evaluation_interval=2)), started(simulated())
    assert "evaluation" not in algo.train()
    found = algo.train()["evaluation"]
    sampler = Sampler("epd", algo.config.table.intervals, "x", "x", algo.mean_table())
    drawn = algo.sample_scored(sampler, HELD_OUT, noise_seeds(Purpose.VALIDATION, 0, 3))
    assert found["env_runners"]["episode_return_mean"] == pytest.approx(drawn.reward.mean())
    assert found["reward/sim"] == pytest.approx(np.mean(drawn.scores["sim"]))
    assert algo.evaluate() == found
    undisturbed.train(), undisturbed.train()
    assert algo.checksum() == undisturbed.checksum()


def test_evaluate_needs_held_out_prompts_and_a_head(started):
    with pytest.raises(ConfigError, match="held_out"):
        started(simulated().rollouts(held_out=[])).evaluate()
    with pytest.raises(ConfigError, match="rewards"):
        started(simulated().rewards({})).evaluate()


@pytest.mark.slow
def test_the_module_is_a_copy_with_the_newest_weights(started):
    algo = started(simulated().env_runners(num_env_runners=1, num_cpus_per_env_runner=0.25).learners(num_learners=1))
    algo.train()
    module = algo.get_module()
    np.testing.assert_array_equal(module.policy.parameters_array(), algo._policies.parameters())
    assert algo.get_module("another") is None and algo.env_runner is None
    assert algo.env_runner_group.num_healthy_remote_workers() == 1
    algo.train()
    assert not np.array_equal(algo.get_module().policy.parameters_array(), module.policy.parameters_array())


@pytest.mark.parametrize(
    ("method", "fix"),
    [
        ("get_policy", "get_module"),
        ("compute_single_action", "distribution"),
        ("compute_actions", "distribution"),
        ("add_module", "get_module"),
        ("remove_module", "get_module"),
        ("add_policy", "get_module"),
        ("remove_policy", "get_module"),
        ("set_weights", "rebase"),
        ("export_policy_model", "save_to_path"),
        ("export_policy_checkpoint", "save_to_path"),
        ("evaluate_offline", "evaluate"),
    ],
)
def test_methods_without_meaning_say_what_to_use(method, fix):
    with pytest.raises(ConfigError, match=rf"no {method}\(\): .*{fix}"):
        getattr(object.__new__(RDPO), method)("anything", option=1)
    assert hasattr(RDPO, fix)


def test_distill_is_the_stage_one_of_a_run(started):
    config = load_config(None, [f"solver.intervals={simulated().table.intervals}", "backbone.family=simulated"])
    algo = started(simulated())
    fits = fit_start_table(config, PromptSplits(PROMPTS, [], []), algo)
    table = algo.distill()
    assert np.array_equal(table.positions, as_table(fits).positions)
    assert np.array_equal(table.weights, as_table(fits).weights)
    assert np.allclose(algo.mean_table().positions, table.positions, atol=1e-6)
    algo.train()
    with pytest.raises(RuntimeError, match="after 1 updates"):
        algo.distill()


def test_the_package_hands_on_the_algorithm():
    assert (epd_ray.RDPO, epd_ray.RDPOConfig) == (RDPO, RDPOConfig) and epd_ray.RDPOConfig().algo_class is RDPO


def test_from_checkpoint_goes_on_bit_identically(started, tmp_path):
    algo = started(simulated())
    algo.train()
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    again = RDPO.from_checkpoint(path)
    algo.train(), again.train()
    assert again.checksum() == algo.checksum()
    again.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_tuner_takes_the_configuration(small_ray, tmp_path):
    config = simulated().training(lr=tune.grid_search([1e-3, 2e-3])).resources(num_cpus_for_main_process=0.5)
    run = tune.RunConfig(stop={"training_iteration": 2}, storage_path=str(tmp_path), verbose=0)
    results = tune.Tuner(RDPO, param_space=config, run_config=run).fit()
    assert len(results) == 2 and not results.errors
    assert {r.config["lr"] for r in results} == {1e-3, 2e-3}
    assert all(np.isfinite(r.metrics["env_runners"]["episode_return_mean"]) for r in results)
    assert ray.is_initialized()
