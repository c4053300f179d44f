"""From the configuration of a run to the specs of its reward actors, and to what they need before they start."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from epd_ray.actors.beforehand import named_cluster, require_models
from epd_ray.actors.cluster import ray_session
from epd_ray.actors.environments import package_spec
from epd_ray.actors.modules import importable
from epd_ray.actors.reward_pool import RewardSpec, wants_gpu
from epd_ray.config.run_config import RunConfig
from epd_ray.config.services import RewardConfig
from epd_ray.types import Metadata
from epd_ray.weights.hub import seek_hub


def reward_spec(reward: RewardConfig) -> RewardSpec:
    """The spec of the actors of a configured head.

    Raises:
        EnvironmentFailure: the head runs in a published package whose environment is not built.
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
    """The key of the GPUs of every head that could use one -> the number of GPUs that each of its actors asks for."""
    heads = {n: r for n, r in config.rewards.items() if r.replicas and wants_gpu(r.head, r.options)}
    return {f"rewards.{name}.num_gpus": reward.num_gpus for name, reward in heads.items()}


@contextmanager
def run_session(config: RunConfig, rows: Mapping[str, Metadata] | None = None) -> Iterator[None]:
    """Join the cluster of a configuration, or check its models and start a local Ray; see `ray_session`.

    Args:
        config: the configuration.
        rows: prompt -> the columns of its row, with one of which a reward server is tried; None where there are none.

    Raises:
        ClusterError: the cluster cannot be joined, or a local Ray does not start.
        ConfigError: a module of `cluster.py_modules` is not there, or the submitted job brings modules of its own.
        EpdRayError: see `require_models`.
    """
    cluster = config.cluster
    modules = importable(cluster.py_modules)
    if not ray.is_initialized():
        require_models(config, rows)
        if named_cluster(cluster.address)[0] is None and head_gpus(config):  # whose files may come from the hub
            seek_hub()
    with ray_session(cluster.address, cluster.env, cluster.dashboard, modules):
        yield
