"""From the configuration of a run to a built algorithm with its actors."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from epd_ray.actors.cluster import warn_of_idle_gpus
from epd_ray.actors.configured import head_gpus, reward_spec, run_session
from epd_ray.actors.encoder import EncoderSpec
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import RDPOSection, SolverConfig
from epd_ray.config.services import ClusterConfig
from epd_ray.drawing.truncation import warn_of_truncation
from epd_ray.prompts.splits import SHAPES
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.solvers import SolverTable
from epd_ray.solvers.table import uniform_table
from epd_ray.types import Metadata

FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "inverse": lambda done: min(1.0, 0.1 / done) if done else 1.0,
}
"""The share of the iterations that are done, in [0, 1] -> the factor of the learning rate, in [0, 1].

Source of "inverse": Robbins and Monro, 1951.
"""


def rdpo_config(
    config: RunConfig,
    prompts: list[str],
    table: SolverTable | None = None,
    rows: Mapping[str, Metadata] | None = None,
) -> RDPOConfig:
    """The configuration of the algorithm for a run; the arguments are those of `algorithm`."""
    rdpo = config.rdpo
    heads = {name: reward_spec(reward) for name, reward in config.rewards.items()}
    built: RDPOConfig = (
        RDPOConfig()
        .solver(
            table=table or _even(config.solver),
            scale_dir=rdpo.scale_dir,
            scale_time=rdpo.scale_time,
            afs=config.solver.afs,
            order=config.solver.order,
            grid=config.solver.grid,
            history=config.solver.history,
            guidance=config.solver.guidance,
            reuse=config.solver.reused if table is None or table.reuse is None else tuple(table.reuse.tolist()),
        )
        .policy(
            concentration=rdpo.concentration,
            concentration_bound=rdpo.concentration_bound,
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
            images_per_job=config.cluster.images_per_job,
            same_latent=rdpo.same_latent,
            baseline=rdpo.baseline,
            staleness=rdpo.staleness,
            keep_images=config.store.images,
        )
        .rewards(heads, normalisation=rdpo.normalisation, rows=rows or {}, heads_column=config.prompts.heads)
        .training(
            lr=learning_rate(rdpo),
            weight_decay=rdpo.weight_decay,
            clip=rdpo.clip,
            num_epochs=rdpo.num_epochs,
            minibatch_size=rdpo.minibatch_size,
            grad_clip=rdpo.grad_clip,
            kl_coeff=rdpo.kl_coeff,
            entropy_coeff=rdpo.entropy_coeff,
        )
        .debugging(seed=config.seed, log_level="ERROR")
    )
    return _placed(built, config.cluster)


def _even(solver: SolverConfig) -> SolverTable:
    """Evenly spaced points of equal weight, with the intervals that reuse."""
    table = uniform_table(solver.intervals, solver.points, solver.start_point)
    return replace(table, reuse=torch.tensor(solver.reused)) if solver.reused else table


def learning_rate(rdpo: RDPOSection) -> float | list[list[float]]:
    """The learning rate as RLlib takes it: a number, or [images drawn so far, rate] for each iteration and the end."""
    if rdpo.lr_schedule == "constant" or not rdpo.iterations:
        return rdpo.lr
    images = rdpo.prompts_per_iteration * rdpo.group_size
    share = FALLS[rdpo.lr_schedule]
    return [[i * images, rdpo.lr * share(i / rdpo.iterations)] for i in range(rdpo.iterations + 1)]


def _placed(built: RDPOConfig, cluster: ClusterConfig) -> RDPOConfig:
    """Set the actors that the section `cluster` of the configuration asks for."""
    encoder = EncoderSpec(cluster.encoder_cpus, cluster.encoder_gpus, cluster.encoder_resources)
    placed: RDPOConfig = (
        built.actors(
            encoder_spec=encoder if cluster.encoder_actors else None,
            max_env_runners=cluster.max_rollout_actors or 0,
            placement_timeout_s=cluster.placement_timeout_s,
            task_timeout_s=cluster.task_timeout_s,
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
    )
    return placed


def _warn_of_idle_gpus(config: RunConfig) -> None:
    """Warn of GPUs that no actor of a run asks for. A driver that draws is left out, because it sees every GPU."""
    cluster = config.cluster
    asked: dict[str, float] = {}
    if ":" in config.backbone.family or config.backbone.model != SHAPES:
        asked |= {"cluster.rollout_gpus": cluster.rollout_gpus} if cluster.rollout_actors else {}
        asked |= {"cluster.encoder_gpus": cluster.encoder_gpus} if cluster.encoder_actors else {}
    warn_of_idle_gpus(asked | head_gpus(config))


@contextmanager
def algorithm(
    config: RunConfig,
    prompts: list[str],
    table: SolverTable | None = None,
    rows: Mapping[str, Metadata] | None = None,
) -> Iterator[RDPO]:
    """Start or join Ray and build the algorithm; both end with the block.

    Args:
        config: the configuration of the run.
        prompts: the prompts to train on.
        table: the table to start from, [N, K]; None for evenly spaced points with equal weights.
        rows: prompt -> the columns of its row that reward heads read, of all prompts that are scored; None for none.

    Raises:
        EpdRayError: Ray cannot be started or joined, the actors have no room, or a model cannot be used.
    """
    with run_session(config, rows):
        _warn_of_idle_gpus(config)
        algo: RDPO = rdpo_config(config, prompts, table, rows).build_algo()
        try:
            yield algo
        finally:
            algo.stop()
            shutil.rmtree(algo.logdir, ignore_errors=True)  # RLlib leaves an empty folder in ~/ray_results


def warn_of_long_prompts(algo: RDPO, prompts: Sequence[str]) -> None:
    """Log one line where the model of an algorithm does not read some prompts to their ends."""
    warn_of_truncation(algo.truncated(prompts), len(prompts))
