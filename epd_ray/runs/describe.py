"""What a run is going to do, in two lines. This module imports no Ray, so that the lines appear at once."""

import math

from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import REFERENCE_STEPS
from epd_ray.prompts.splits import SHAPES
from epd_ray.solvers.costs import passes_per_eval
from epd_ray.solvers.table import SolverTable, uniform_table
from epd_ray.telemetry.progress import counted

SECONDS_PER_PASS = 0.005  # of the embedded model, for one picture on one CPU core
SECONDS_AROUND = 60.0  # for the start of Ray and its actors, the learner's updates, and the report


def describe(config: RunConfig) -> tuple[str, str]:
    """What a run will do and about how long it takes, in two lines."""
    s, r = config.solver, config.rdpo
    table = uniform_table(s.intervals, s.points, s.start_point)
    model = config.backbone.arguments.get("model", config.backbone.family)
    heads = [name for name, head in config.rewards.items() if head.weight]
    what = (
        f"This run fine-tunes a solver of {counted(s.intervals, 'interval')} with {counted(s.points, 'point')} each "
        f"(parallel NFE {table.cost(s.afs).parallel_nfe}) for the model {model} on the "
        f"{'rewards' if len(heads) > 1 else 'reward'} {', '.join(heads)}: {counted(r.iterations, 'iteration')}, "
        f"{counted(r.iterations * r.prompts_per_iteration * r.group_size, 'image')}."
    )
    if model != SHAPES or config.cluster.rollout_gpus:
        return what, "The progress line of the first iteration will show how long the run takes."
    passes, actors = _passes(config, table), config.cluster.rollout_actors
    seconds = SECONDS_AROUND + passes * SECONDS_PER_PASS / max(1, actors)
    workers = f"{counted(actors, 'rollout actor')} on CPU cores" if actors else "the driver on one CPU core"
    return what, f"It takes {passes:,} network passes, about {_rounded(seconds)} with {workers}."


def _rounded(seconds: float) -> str:
    """Such as "1 minute", "40 minutes" or "3 hours"."""
    minutes = max(1, round(seconds / 60))
    return counted(minutes, "minute") if minutes < 100 else counted(round(minutes / 60), "hour")


def _passes(config: RunConfig, table: SolverTable) -> int:
    """The network passes of all stages together, for the embedded model, whose own guidance scale is above 1."""
    s, r, e, d = config.solver, config.rdpo, config.evaluation, config.distill
    cost = table.cost(s.afs)
    evals, depth = cost.model_evals, cost.parallel_nfe
    rivals = (depth + evals * e.equal_evals) * len(e.baselines)
    compared = REFERENCE_STEPS + evals * 2 + rivals * (2 if e.tune else 1)
    total = r.iterations * r.prompts_per_iteration * r.group_size * evals
    total += (1 + r.iterations // e.every) * config.prompts.validation * evals + config.prompts.test * compared
    if e.tune:
        total += e.tune_images * rivals + e.tune_images // 2 * REFERENCE_STEPS
    if d.enabled and d.table is None:
        total += d.prompts * s.intervals * (2 * d.teacher_steps + d.grid + 2)
        if d.method == "gradient":  # the forward and backward passes of a step cost about four passes a point
            total += (4 * d.steps * d.batch + 2 * d.prompts) * s.points * s.intervals
    scale = config.backbone.guidance_scale
    return total * passes_per_eval(math.inf if scale is None else scale, classifier_free=True)
