"""What the actors of a configured run need."""

from epd_ray.actors.environments import package_spec
from epd_ray.actors.reward_pool import RewardSpec, wants_gpu
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import RewardConfig


def reward_spec(reward: RewardConfig) -> RewardSpec:
    """What an actor of a configured head needs.

    Raises:
        EpdRayError: the package backend has no environment.
    """
    target, python = package_spec(reward.head) if reward.backend == "package" else (None, None)
    return RewardSpec(
        head=reward.head,
        target=target,
        options=reward.options,
        weight=reward.weight,
        replicas=reward.replicas,
        min_replicas=reward.min_replicas,
        max_replicas=reward.max_replicas,
        num_cpus=reward.num_cpus,
        num_gpus=reward.num_gpus,
        resources=reward.resources,
        python=None if python is None else str(python),
    )


def head_gpus(config: RunConfig) -> dict[str, float]:
    """Key -> what the actors of a head that could use a GPU ask for."""
    heads = {n: r for n, r in config.rewards.items() if r.replicas and wants_gpu(r.head, r.options)}
    return {f"rewards.{name}.num_gpus": reward.num_gpus for name, reward in heads.items()}
