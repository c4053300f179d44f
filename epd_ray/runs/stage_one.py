"""Where a run starts: the solver table that stage 1 fits to a finer solver, or one that the user gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from epd_ray.config.deciding import digest_without_seed
from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.worker import BackboneFacts, require_guidance
from epd_ray.errors import TableError, shown
from epd_ray.prompts.splits import PromptSplits
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.interval import largest_sigma
from epd_ray.stage_one.fit import StageOne, fit_table
from epd_ray.stage_one.gradient import Descent
from epd_ray.stage_one.shard import Fit, Parts, as_table
from epd_ray.telemetry.progress import Observer


def given_solver(config: RunConfig) -> Solver | None:
    """The solver that `distill.table` names; None where the run fits its own.

    Raises:
        TableError: the solver cannot be read, or its shape or options differ from those of the run.
    """
    if config.distill.table is None:
        return None
    solver = Solver.from_pretrained(config.distill.table)
    table = solver.table
    for key, has in (("afs", solver.afs), ("order", solver.order), ("start_point", table.start_point)):
        if has != (asked := getattr(config.solver, key)):
            raise TableError(f"{config.distill.table} has {key} {has}, the run {asked}: set solver.{key} to match")
    wanted = (config.solver.intervals, config.solver.points)
    if (table.intervals, table.points) != wanted:
        raise TableError(
            f"{config.distill.table} has {table.intervals} intervals of {table.points} points, the run {wanted[0]} of "
            f"{wanted[1]}: set solver.intervals and solver.points to match"
        )
    listed = [i + 1 for i in table.reused]
    asked = config.solver.reuse
    if len(listed) != asked if isinstance(asked, int) else listed != sorted(asked):
        raise TableError(
            f"{config.distill.table} reuses in the intervals {listed}, the run has {shown(asked)}: "
            f"set solver.reuse={listed}"
        )
    return solver


def fit_start_table(
    config: RunConfig, prompts: PromptSplits, algo: RDPO, observer: Observer | None = None
) -> list[Fit]:
    """Run stage 1 on the first training prompts; the observer sees one step per interval.

    Returns:
        The fit of each interval, N of them, in the order of sampling.
    """
    chosen, facts, solver = prompts.train[: config.distill.prompts], algo.facts, config.solver
    require_guidance(facts, scales=solver.guidance, reuse=bool(solver.reuse))
    seeds = noise_seeds(Purpose.STAGE_ONE, config.seed, len(chosen))
    stage = stage_one(config, chosen, seeds, facts.guidance_scale)

    def begin(name: str, steps: int) -> None:
        if observer is not None:
            observer.stage(name, steps)

    def show(fit: Fit | None) -> None:
        if observer is not None:
            observer.advance(1, **({} if fit is None else {"residual": fit.residual}))

    descent = descent_of(config, facts)
    return fit_table(algo.work, stage, facts.sigmas, descent, begin=begin, after_each=show)


@dataclass(frozen=True)
class StageOneCost:
    """What stage 1 took. No picture is decoded for it.

    Attributes:
        prompts: the number of prompts.
        network_passes: the passes of the network, those of all prompts together. A worker that goes on with what
            another one began makes the states again, so they grow a little with the number of workers.
        images: the pictures that the fitted solver draws with as many passes.
    """

    prompts: int
    network_passes: int
    images: int

    def __str__(self) -> str:
        return (
            f"stage 1: {self.prompts} prompts, {self.network_passes:,} network passes, as many as the fitted solver "
            f"needs for {self.images:,} pictures"
        )


def cost_of(fits: Sequence[Fit], config: RunConfig, prompts: PromptSplits, facts: BackboneFacts) -> StageOneCost:
    """What a stage 1 took.

    Args:
        fits: its result.
        config: the configuration of the run.
        prompts: the prompts of the run.
        facts: what the rollout actors report about the model.
    """
    passes = sum(fit.passes for fit in fits)
    each = as_table(fits).cost(config.solver.afs).network_passes(facts.guidance_scale, facts.classifier_free)
    return StageOneCost(len(prompts.train[: config.distill.prompts]), passes, round(passes / (each or 1)))


def stage_one(
    config: RunConfig, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float | None = None
) -> StageOne:
    """The settings of stage 1 for a run.

    Args:
        config: the configuration of the run.
        prompts: the B prompts on which the table is fitted.
        seeds: one noise seed per prompt.
        guidance_scale: the guidance scale of the run; None takes that of the configuration.
    """
    s, d = config.solver, config.distill
    scale = config.backbone.guidance_scale if guidance_scale is None else guidance_scale
    return StageOne(
        intervals=s.intervals,
        points=s.points,
        prompts=tuple(prompts),
        noise_seeds=tuple(seeds),
        shard_size=config.cluster.images_per_job,
        teacher_steps=d.teacher_steps,
        grid=d.grid,
        min_weight=d.min_weight,
        afs=s.afs,
        order=s.order,
        start_point=s.start_point,
        scale_range=_scale_range(config),
        noise_levels=s.grid,
        parts=Parts(s.history, s.guidance, tuple(i - 1 for i in s.listed)),
        reuse_count=s.reuse_count,
        guidance_scale=1.0 if scale is None else scale,
    )


def descent_of(config: RunConfig, facts: BackboneFacts) -> Descent | None:
    """The settings of the gradient descent of stage 1; None where the run fits by least squares."""
    d = config.distill
    if d.method == "least_squares":
        return None
    batch = max(1, round(d.batch / config.cluster.images_per_job))
    return Descent(
        d.steps,
        d.lr,
        batch,
        d.min_weight,
        scale_range=_scale_range(config),
        scale_time=config.rdpo.scale_time,
        start_point=config.solver.start_point,
        max_sigma=largest_sigma(facts.form, facts.sigmas[0]),
    )


def _scale_range(config: RunConfig) -> float:
    """0 where the policy draws no direction scales: it would set those that stage 1 finds back to 1."""
    return config.distill.scale_range if config.rdpo.scale_dir else 0.0


def made_by(config: RunConfig, facts: BackboneFacts, table: SolverTable, **meta: Any) -> Solver:
    """A solver with the table of a run.

    Args:
        config: the configuration of the run.
        facts: what the rollout actors report about the model.
        table: the table, [N, K].
        **meta: further entries of the solver's metadata, beside those that name the model and the run's seed.
    """
    about = {
        "backbone": facts.family,
        "model_id": facts.model_id,
        **facts.more,
        "guidance_scale": facts.guidance_scale,
        "classifier_free": facts.classifier_free,
        "registry": config.backbone.family,
        "options": config.backbone.portable,
        "run": {"seed": config.seed, "settings": digest_without_seed(config)},
        **meta,
    }
    sigmas = torch.tensor(facts.sigmas, dtype=torch.float64)
    return Solver(table, sigmas, facts.form, config.solver.afs, config.solver.order, about)


def weights_of(config: RunConfig) -> dict[str, float]:
    """The name of each reward head -> its weight in the reward, as a solver file stores it."""
    return {name: head.weight for name, head in config.rewards.items()}
