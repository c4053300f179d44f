"""Sample efficiency: images until the held-out reward is that of the reference's settings after the whole budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

from epd_ray.actors.beforehand import panel_of
from epd_ray.bench.kept import FOLDER, kept
from epd_ray.bench.record import Record, Value, under
from epd_ray.bench.settings import PUBLISHED_SOLVER
from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.evaluation.statistics import median_interval
from epd_ray.prompts.splits import load_prompts
from epd_ray.rdpo.session import algorithm
from epd_ray.runs.stage_one import fit_start_table
from epd_ray.runs.trainer import held_out
from epd_ray.stage_one.shard import as_table

REFERENCE = (
    *PUBLISHED_SOLVER,
    "rdpo.baseline=mixed",
    "rdpo.same_latent=false",
    "rdpo.lr=7e-5",
    "rdpo.concentration=10",
    "rdpo.prompts_per_iteration=2",
    "rdpo.minibatch_size=4",
    "rdpo.concentration_bound=1e6",
    "rdpo.staleness=0",
)
# For pictures that are expensive: small batches, each used four times and never stale, and a learning rate that falls
# after a tenth of the iterations.
FEW_IMAGES = (
    "rdpo.prompts_per_iteration=2",
    "rdpo.minibatch_size=8",
    "rdpo.num_epochs=4",
    "rdpo.clip=0.4",
    "rdpo.lr=7e-4",
    "rdpo.lr_schedule=inverse",
    "rdpo.iterations=80",
    "rdpo.concentration=10",
    "rdpo.staleness=0",
)
ARMS = {
    "reference": REFERENCE,
    "reference_tuned": (*REFERENCE, "rdpo.lr=3e-4"),
    "ours": FEW_IMAGES,
    "ours_published_solver": (*FEW_IMAGES, *PUBLISHED_SOLVER),
}
"""Settings that are compared, each with a stage 1 of its own. The last one has the reference's solver, and so shows how
much of our gain comes from the form of the solver."""
BUDGET = 3200
CHECKS = (*range(32, 321, 32), *range(480, 961, 160), *range(1280, BUDGET + 1, 320))
"""Images after which every arm is judged, the same for all, because more checks would be more chances to be lucky."""
SMALL_JOBS = "cluster.images_per_job=4"  # so that the reference's batch of 8 keeps two actors busy too
RULES = {"first": 1, "twice": 2}
"""Name of a rule -> checks in a row at which the target must be reached, because a single one may have been lucky."""


@dataclass(frozen=True)
class Curve:
    """The held-out rewards of an arm on one seed.

    Attributes:
        images: number of images drawn before each check, from 0.
        rewards: held-out reward of the mean table at each check; the first is that of the distilled table.
    """

    images: list[int]
    rewards: list[float]

    def reached(self, target: float, in_a_row: int = 1) -> float:
        """Images at the first of `in_a_row` successive checks that reach the target; infinite where there are none."""
        above = [reward >= target for reward in self.rewards]
        for i in range(len(above) - in_a_row + 1):
            if all(above[i : i + in_a_row]):
                return self.images[i]
        return math.inf


def efficiency(
    seeds: Sequence[int] = range(5), folder: Path = FOLDER, overrides: Sequence[str] = (), budget: int = BUDGET
) -> Record:
    """Images until the held-out reward is that of the reference's settings after the budget, per arm and seed.

    A seed decides training prompts, held-out prompts, noise and draws. The arms of a seed start from the table that
    stage 1 finds for their solver, and are judged on the same held-out prompts and noise at the same numbers of images.

    Args:
        seeds: the seeds; the settings were chosen on seeds of 100 and above, which are none of these.
        folder: folder in which the curve of each arm is kept, and from which finished ones are read.
        overrides: changes of all arms' settings.
        budget: number of images of an arm at most.

    Returns:
        Images per seed, arm and rule, None where the target is not reached, and their medians with intervals over the
        seeds, which are over prompts too, because each seed has held-out prompts of its own.
        `<arm>/<rule>/ours_times_fewer` is the median over the seeds of an arm's images over ours, and
        `budget/ours_times_fewer` the budget over the median of ours.

    Raises:
        RunDirectoryError: the folder holds a curve of other settings.
    """
    values: dict[str, Value] = {}
    found: dict[str, list[float]] = {}
    for seed in seeds:
        curves = _curves(seed, folder, overrides, budget)
        target = curves["reference"].rewards[-1]
        values |= {f"seed_{seed}/{arm}/distilled_reward": curve.rewards[0] for arm, curve in curves.items()}
        values[f"seed_{seed}/target"] = target
        for (arm, curve), (rule, in_a_row) in product(curves.items(), RULES.items()):
            images = curve.reached(target, in_a_row)
            found.setdefault(f"{arm}/{rule}", []).append(images)
            values[f"seed_{seed}/{arm}/{rule}"] = _number(images)
    values |= _compared(found)
    values["budget/ours_times_fewer"] = _number(_times(budget, median_interval(found["ours/first"]).median))
    return Record("efficiency", {"budget": budget, "interval_over": "seeds, each with its own prompts"}, values)


def _curves(seed: int, folder: Path, overrides: Sequence[str], budget: int) -> dict[str, Curve]:
    """The curve of each arm on one seed; the reference's comes first, and its end is the target of the others."""
    curves: dict[str, Curve] = {}
    for arm, own in ARMS.items():
        config = load_config(None, (f"seed={seed}", SMALL_JOBS, *own, *overrides))
        goal = curves["reference"].rewards[-1] if curves else None
        rules = {"budget": budget, "checks": list(CHECKS), "target": goal}
        measure = partial(_measured, config, budget, goal)
        curves[arm] = kept(folder / f"{arm}-seed{seed}.json", config, rules, Curve, measure)
    return curves


def _compared(found: Mapping[str, Sequence[float]]) -> dict[str, Value]:
    """Medians over the seeds of the images of each arm and rule, and how many times fewer ours are."""
    values: dict[str, Value] = {}
    for name, images in found.items():
        arm, rule = name.split("/")
        values |= under(name, {key: _number(value) for key, value in asdict(median_interval(images)).items()})
        if arm != "ours":
            fewer = [_times(theirs, ours) for theirs, ours in zip(images, found[f"ours/{rule}"], strict=True)]
            values[f"{name}/ours_times_fewer"] = _number(median_interval(fewer).median)
    return values


def _times(theirs: float, ours: float) -> float:
    """Their images over ours, at least those of the first check each; 1 where neither reached the target."""
    theirs, ours = max(theirs, CHECKS[0]), max(ours, CHECKS[0])
    return theirs / ours if math.isfinite(ours) else float(theirs == ours)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _measured(config: RunConfig, budget: int, target: float | None) -> Curve:
    """Train until the target is reached twice in a row, or the budget is spent.

    Args:
        config: configuration of the run.
        budget: number of images at most.
        target: the held-out reward to reach; None means that the whole budget is spent.
    """
    prompts = load_prompts(config.prompts, config.seed, panel_of(config))
    with algorithm(config, prompts.train, rows=prompts.rows) as algo:
        algo.rebase(as_table(fit_start_table(config, prompts, algo)))
        curve = Curve([], [])
        for images in (0, *[check for check in CHECKS if check <= budget]):
            while algo.policy_version * algo.config.batch_plan.images < images:
                algo.train()
            curve.images.append(images)
            curve.rewards.append(held_out(config, prompts, algo))
            if target is not None and math.isfinite(curve.reached(target, max(RULES.values()))):
                break
    return curve
