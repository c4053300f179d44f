"""From a run's configuration to live actors."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from epd_ray.actors import RewardSpec
from epd_ray.config import RunConfig
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.config import RDPOConfig, uniform_table
from epd_ray.scoring import Normalisation
from epd_ray.solvers import SolverTable

ONE_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without it Ray listens on every interface
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors that ask for no GPU keep seeing the devices there are
}


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Join a Ray cluster, or start one on this machine's loopback and end it afterwards; one that runs is used.

    Args:
        address: of a cluster; None for a local one, unless a submitted job names its cluster.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Actors import the package from where the driver has it, installed or not.
    here = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    environment = {"env_vars": {"PYTHONPATH": paths}}
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        os.environ.update(ONE_MACHINE)
        ray.init(
            num_cpus=max(os.cpu_count() or 1, 2),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            runtime_env=environment,
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()


def rdpo_config(config: RunConfig, prompts: list[str], table: SolverTable | None = None) -> RDPOConfig:
    """The algorithm's configuration of a run, starting from `table` (evenly spaced points when None)."""
    rdpo, cluster = config.rdpo, config.cluster
    heads = {
        name: RewardSpec(
            head=r.head,
            options=r.options,
            normalisation=Normalisation(r.weight, r.shift, r.scale, r.low, r.high),
            replicas=r.replicas,
            num_cpus=r.num_cpus,
            num_gpus=r.num_gpus,
            resources=r.resources,
        )
        for name, r in config.rewards.items()
    }
    built: RDPOConfig = (
        RDPOConfig()
        .solver(
            table=table or uniform_table(config.solver.intervals, config.solver.points),
            concentration=rdpo.concentration,
            concentration_bound=rdpo.concentration_bound,
            scale_dir=rdpo.scale_dir,
            scale_time=rdpo.scale_time,
            afs=config.solver.afs,
            order=config.solver.order,
            hidden_width=rdpo.hidden_width,
            hidden_depth=rdpo.hidden_depth,
        )
        .backbone(
            family=config.backbone.family,
            options=config.backbone.arguments,
            guidance_scale=config.backbone.guidance_scale,
        )
        .rollouts(
            prompts=prompts,
            prompts_per_iteration=rdpo.prompts_per_iteration,
            group_size=rdpo.group_size,
            images_per_job=cluster.images_per_job,
            same_latent=rdpo.same_latent,
            baseline=rdpo.baseline,
            max_staleness=rdpo.staleness,
        )
        .rewards(heads)
        .training(
            lr=rdpo.lr,
            weight_decay=rdpo.weight_decay,
            clip_param=rdpo.clip,
            num_epochs=rdpo.epochs,
            minibatch_size=rdpo.minibatch,
            grad_clip=rdpo.grad_clip,
            kl_coeff=rdpo.kl_coeff,
            entropy_coeff=rdpo.entropy_coeff,
        )
        .env_runners(
            num_env_runners=cluster.rollout_actors,
            num_cpus_per_env_runner=cluster.rollout_cpus,
            num_gpus_per_env_runner=cluster.rollout_gpus,
            custom_resources_per_env_runner=dict(cluster.rollout_resources),
        )
        .learners(
            num_learners=cluster.learner_actors,
            num_cpus_per_learner=cluster.learner_cpus,
            num_gpus_per_learner=cluster.learner_gpus,
        )
        .debugging(seed=config.seed, log_level="ERROR")
    )
    return built


@contextmanager
def algorithm(config: RunConfig, prompts: list[str], table: SolverTable | None = None) -> Iterator[RDPO]:
    """A built RDPO on a Ray session, both ended afterwards."""
    with ray_session(config.cluster.address):
        algo: RDPO = rdpo_config(config, prompts, table).build_algo()
        try:
            yield algo
        finally:
            algo.stop()
