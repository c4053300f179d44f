"""Sample efficiency: images until the held-out reward is what the reference's settings have after 3,200."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

from epd_ray.bench.kept import FOLDER, kept
from epd_ray.config.loading import RunConfig, load_config
from epd_ray.evaluation.statistics import median_interval
from epd_ray.prompts.splits import load_prompts
from epd_ray.rdpo.session import algorithm
from epd_ray.runs.trainer import distil, held_out
from epd_ray.stage_one.shard import as_table

PUBLISHED_SOLVER = ("solver.points=2", "solver.start_point=false", "rdpo.scale_dir=false")  # as many evaluations
REFERENCE = (
    *PUBLISHED_SOLVER,
    "rdpo.baseline=mixed",
    "rdpo.same_latent=false",
    "rdpo.lr=7e-5",
    "rdpo.concentration=10",
    "rdpo.prompts_per_iteration=2",
    "rdpo.minibatch=4",
    "rdpo.concentration_bound=1e6",
    "rdpo.staleness=0",
)
# Where pictures are dear, not waiting: small batches, each used four times, never stale, a rate that falls from 64 on.
FEW_IMAGES = (
    "rdpo.prompts_per_iteration=2",
    "rdpo.minibatch=8",
    "rdpo.epochs=4",
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
"""Each stands on its own stage 1; the last, on the reference's, tells what of ours comes from the solver's form."""
BUDGET = 3200
CHECKS = (*range(32, 321, 32), *range(480, 961, 160), *range(1280, BUDGET + 1, 320))
"""Images after which every arm is judged, the same for all: more looks would be more chances."""
SMALL_JOBS = "cluster.images_per_job=4"  # so that the reference's batch of 8 keeps two actors busy as well
RULES = {"first": 1, "twice": 2}
"""Checks in a row at which the target must hold: a curve that touches it once may have been lucky."""
Record = dict[str, float | int | str | bool | None]


@dataclass(frozen=True)
class Curve:
    """How an arm went on one seed.

    Attributes:
        images: drawn before each check, from 0.
        rewards: held-out reward of the mean table at each; the first is the distilled table's.
    """

    images: list[int]
    rewards: list[float]

    def reached(self, target: float, in_a_row: int = 1) -> float:
        """Images at the first of so many checks in a row that are at the target or above; infinite: there is none."""
        above = [reward >= target for reward in self.rewards]
        for i in range(len(above) - in_a_row + 1):
            if all(above[i : i + in_a_row]):
                return self.images[i]
        return math.inf


def efficiency(
    seeds: Sequence[int] = range(5), folder: Path = FOLDER, overrides: Sequence[str] = (), budget: int = BUDGET
) -> Record:
    """Images until the held-out reward is what the reference's settings have after the budget, per arm and seed.

    A seed decides training prompts, held-out prompts, noise and draws. Its arms start from the table that stage 1 finds
    for their solver and are judged on the same 48 held-out prompts and noise, at the same numbers of images.

    Args:
        seeds: none of those that settings were chosen on (100 and above).
        folder: where each arm's curve is kept when it is done; those that lie there are not measured again.
        overrides: of all arms' settings.
        budget: images of an arm at most.

    Returns:
        Images per seed, arm and rule, null where the target is not reached, and their medians with intervals;
        `<arm>/<rule>/ours_times_fewer` is the median over seeds of an arm's images over ours, `budget/ours_times_fewer`
        the budget over the median of ours.

    Raises:
        RunDirectoryError: the folder holds a curve of other settings.
    """
    record: Record = {"budget": budget}
    found: dict[str, list[float]] = {}
    for seed in seeds:
        curves: dict[str, Curve] = {}
        for arm, own in ARMS.items():
            config = load_config(None, (f"seed={seed}", SMALL_JOBS, *own, *overrides))
            goal = curves["reference"].rewards[-1] if curves else None
            rules = {"budget": budget, "checks": list(CHECKS), "target": goal}
            measure = partial(_measured, config, budget, goal)
            curves[arm] = kept(folder / f"{arm}-seed{seed}.json", config, rules, Curve, measure)
            record[f"seed_{seed}/{arm}/distilled_reward"] = curves[arm].rewards[0]
        target = record[f"seed_{seed}/target"] = curves["reference"].rewards[-1]
        for (arm, curve), (rule, in_a_row) in product(curves.items(), RULES.items()):
            found.setdefault(f"{arm}/{rule}", []).append(curve.reached(target, in_a_row))
            record[f"seed_{seed}/{arm}/{rule}"] = _number(found[f"{arm}/{rule}"][-1])
    for name, images in found.items():
        record |= {f"{name}/{key}": _number(value) for key, value in asdict(median_interval(images)).items()}
        arm, rule = name.split("/")
        fewer = [_times(theirs, ours) for theirs, ours in zip(images, found[f"ours/{rule}"], strict=True)]
        if arm != "ours":
            record[f"{name}/ours_times_fewer"] = _number(median_interval(fewer).median)
    record["budget/ours_times_fewer"] = _number(_times(budget, median_interval(found["ours/first"]).median))
    return record


def _times(theirs: float, ours: float) -> float:
    """How often the images of ours go into theirs; 1 where neither got there. Who starts there counts as at check 1."""
    theirs, ours = max(theirs, CHECKS[0]), max(ours, CHECKS[0])
    return theirs / ours if math.isfinite(ours) else float(theirs == ours)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no infinity


def _measured(config: RunConfig, budget: int, target: float | None) -> Curve:
    """Train until the target holds twice in a row, or the budget is spent.

    Args:
        config: of the run.
        budget: images.
        target: None: the budget is spent.
    """
    prompts = load_prompts(config.prompts, config.seed)
    with algorithm(config, prompts.train) as algo:
        algo.rebase(as_table(distil(config, prompts, algo)))
        curve = Curve([], [])
        for images in (0, *[check for check in CHECKS if check <= budget]):
            while algo.policy_version * algo.config.batch_plan.images < images:
                algo.train()
            curve.images.append(images)
            curve.rewards.append(held_out(config, prompts, algo))
            if target is not None and math.isfinite(curve.reached(target, max(RULES.values()))):
                break
    return curve
