"""Which of RLlib's settings and callbacks RDPO obeys; every other one is refused when it is changed."""

from collections.abc import Iterator
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.policy.policy import PolicySpec
from ray.rllib.utils import force_list

from epd_ray.errors import shown

CALLBACKS = frozenset(
    {"on_algorithm_init", "on_train_result", "on_evaluate_start", "on_evaluate_end", "on_checkpoint_loaded"}
)
"""The callbacks that RDPO calls."""

OBEYED = frozenset(
    {
        *("num_env_runners", "num_cpus_per_env_runner", "num_gpus_per_env_runner", "custom_resources_per_env_runner"),
        *("num_learners", "num_cpus_per_learner", "num_gpus_per_learner", "custom_resources_per_learner"),
        *("num_cpus_for_main_process", "custom_resources_for_main_process", "placement_strategy", "local_gpu_idx"),
        *("restart_failed_env_runners", "max_num_env_runner_restarts", "validate_env_runners_after_construction"),
        *("lr", "grad_clip", "grad_clip_by", "num_epochs", "minibatch_size", "shuffle_batch_per_epoch"),
        *("log_gradients", "torch_skip_nan_gradients", "_learner_class", "learner_config_dict", "seed", "log_level"),
        *("callbacks_class", *(f"callbacks_{name}" for name in CALLBACKS), "evaluation_interval", "stats_cls_lookup"),
    }
)
"""The settings of AlgorithmConfig that RDPO obeys."""

WITHOUT_EFFECT = {
    "algo_class": "build_algo() builds RDPO, or the class that the configuration was made for",
    "create_local_env_runner": "it follows from num_env_runners",
    "simple_optimizer": "RLlib derives it",
    "_is_frozen": "a state of the configuration",
    "_is_atari": "a state of the configuration",
    "_per_module_overrides": "a state of the configuration",
    "_validate_config": "every configuration is validated",
    "in_evaluation": "RLlib sets it in its copy of the configuration for evaluations",
}
"""Settings of AlgorithmConfig that change without the user, and why they change nothing."""

NO_ENVIRONMENT = "RDPO has no environment: give prompts to rollouts() and the model to backbone()"
OWN_ROLLOUTS = "RDPO draws pictures in place of episodes: use rollouts() and actors()"
OWN_POLICY = "RDPO has one policy of its own: use policy()"
HELD_OUT = "evaluate() draws each held-out prompt once: use rollouts(held_out=...) and evaluation_interval"
ONE_UPDATE = "train() is one update of the policy: use rollouts(prompts_per_iteration=..., group_size=...)"
INSTEAD = (
    (("env_runner_health", "env_runner_restore", "env_runner_cls", "env_runner_state", "env_to_"), OWN_ROLLOUTS),
    (("env", "observation_", "action_space", "clip_actions", "clip_rewards", "normalize_actions"), NO_ENVIRONMENT),
    (("render_env", "disable_env_checking", "gym_env", "auto_wrap", "create_env", "remote_"), NO_ENVIRONMENT),
    (("gamma",), "RDPO has no discount, because a picture is one step"),
    (("sample_timeout_s",), "use actors(task_timeout_s=...)"),
    (("evaluation_", "custom_evaluation", "always_attach_eval", "enable_async_eval", "custom_async"), HELD_OUT),
    (("offline_", "input_", "output", "dataset_", "prelearner", "materialize_"), "RDPO learns from its own pictures"),
    (("train_batch_size", "min_", "learning_starts", "timesteps_"), ONE_UPDATE),
    (("rollout_fragment", "batch_mode", "num_envs", "episode", "sample", "compress_", "module_to_"), OWN_ROLLOUTS),
    (("model", "rl_module_spec", "policies", "policy_", "explor", "optimizer", "algorithm_config_over"), OWN_POLICY),
    (("callbacks_on_sample_end",), "use on_train_result: algorithm.last.rollouts are the pictures of the iteration"),
    (("callbacks_on_ep", "callbacks_on_env"), "RDPO has no episodes: use on_train_result"),
    (("enable_", "framework"), "RDPO needs torch and RLlib's new API stack"),
)
"""The beginnings of settings' names, and what to use in their place."""


def refused(config: AlgorithmConfig, expected: AlgorithmConfig) -> list[str]:
    """The settings and callbacks that the user has changed and that RDPO would not obey, as one line for each.

    Args:
        config: the user's configuration.
        expected: a configuration with the values that need no refusal.
    """
    found = []
    for name in settings():
        given, usual = getattr(config, name, None), getattr(expected, name, None)
        if not _same(given, usual):
            found.append(f"{name.lstrip('_')} is {shown(given)}, which RDPO does not obey ({instead(name)})")
    return found + [f"the callback {name} is never called ({instead(name)})" for name in _overridden(config)]


def settings() -> list[str]:
    """The names of AlgorithmConfig's settings that are refused when they are changed."""
    return [name for name in vars(AlgorithmConfig()) if name not in OBEYED and name not in WITHOUT_EFFECT]


def instead(name: str) -> str:
    """What to use in place of a setting or callback of RLlib."""
    plain = f"callbacks_{name}" if name.startswith("on_") else name.lstrip("_")
    return next((words for starts, words in INSTEAD if plain.startswith(starts)), "leave it at its default")


def _same(given: Any, usual: Any) -> bool:
    """Whether two values are equal; RLlib makes a plain tuple of each PolicySpec where it copies a configuration."""
    if isinstance(given, dict) and isinstance(usual, dict):
        return given.keys() == usual.keys() and all(_same(given[key], usual[key]) for key in given)
    if isinstance(given, tuple) and isinstance(usual, PolicySpec):
        return bool(given == usual.get_state())
    try:
        return given is usual or (type(given) is type(usual) and bool(given == usual))
    except Exception:  # values of a stranger, whose comparison may raise anything
        return False


def _overridden(config: AlgorithmConfig) -> Iterator[str]:
    """The callbacks that the user's classes define and RDPO does not call."""
    for name in vars(RLlibCallback):
        if name.startswith("on_") and name not in CALLBACKS:
            own = getattr(RLlibCallback, name)
            if any(getattr(made, name, own) is not own for made in force_list(config.callbacks_class)):
                yield name
