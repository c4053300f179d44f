"""What a headroom says: its table, its plot, and whether the model has room for better solvers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context

from epd_ray.evaluation.records import Tuned
from epd_ray.evaluation.statistics import Interval, bootstrap_mean, judged, paired_difference
from epd_ray.evaluation.wording import named, plain
from epd_ray.report.figures import STYLE, Measured, cost_curve, publish
from epd_ray.solvers.rival import Rival
from epd_ray.storage.run_directory import make_folder, write_text
from epd_ray.telemetry.progress import counted
from epd_ray.types import FloatArray

REWARD = "reward"
"""The name of the trained reward among the metrics."""
BEST = "the best of all methods"
FEW, MORE = 4, 8
HALF_WIDTHS, TIMES = 5.0, 2.0
GUIDANCE = (1.5, 6.0)


@dataclass(frozen=True)
class Point:
    """A method at its best, on the test prompts.

    Attributes:
        rival: the text form of the method with its settings.
        label: the method's name for people.
        guidance_scale: the guidance scale of its pictures.
        network_passes: the passes of the network for a picture.
        validation: the mean of the trained reward on the validation prompts.
        scores: metric -> its value for each test prompt, None where its head does not judge the prompt; "reward" is the
            trained one, which every prompt has.
        frechet_distance: the distance of the pictures to the reference set; None if it was not measured.
    """

    rival: str
    label: str
    guidance_scale: float
    network_passes: int
    validation: float
    scores: Mapping[str, list[float | None]]
    frechet_distance: float | None = None

    @property
    def means(self) -> dict[str, Interval]:
        """Metric -> its mean with the 95 % interval over the prompts that its head judges."""
        return {metric: bootstrap_mean(judged(_floats(values))) for metric, values in self.scores.items()}


def _floats(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return np.array(values, np.float64)  # None becomes NaN


@dataclass(frozen=True)
class Measurement:
    """What was found with one number of evaluations.

    Attributes:
        evals: the number of evaluations.
        images: the number of validation pictures that the search drew.
        candidates: the number of settings that were tried.
        points: the finalists, the best on the validation prompts first.
    """

    evals: int
    images: int
    candidates: int
    points: list[Point]

    def __post_init__(self) -> None:
        points = [Point(**point) if isinstance(point, dict) else point for point in self.points]
        object.__setattr__(self, "points", points)

    @property
    def best(self) -> Point:
        """The finalist with the largest trained reward on the validation prompts."""
        return self.points[0]


def ranked(rewards: Mapping[Rival, FloatArray]) -> list[Rival]:
    """The best settings of each method, the best method first.

    Rewards on more prompts are firmer, so a rival that went on counts before one that was left behind. Methods that
    draw the same pictures, as several do in few steps, count once.
    """
    best: dict[str, tuple[int, float, Rival]] = {}
    for rival, values in rewards.items():
        place = (len(values), float(values.mean()), rival)
        if np.isfinite(values).all() and (rival.method not in best or place[:2] > best[rival.method][:2]):
            best[rival.method] = place
    found: list[Rival] = []
    for _, _, rival in sorted(best.values(), key=lambda place: place[:2], reverse=True):
        if not any(np.array_equal(rewards[rival], rewards[other]) for other in found):
            found.append(rival)
    return found


def write_report(found: Sequence[Measurement], model: str, folder: Path) -> list[str]:
    """Write headroom.md and headroom.png for each metric.

    Args:
        found: the measurements, by increasing number of evaluations; the last one is the reference.
        model: the model's name.
        folder: receives the files.

    Returns:
        The table and the verdict, as lines for the terminal; the last line is the verdict.
    """
    make_folder(folder)
    rows, said = table(found), verdict(found)
    head, *body = [[cell.replace("|", "/") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    drawn = sum(one.images for one in found)
    about = (
        f"The best of guidance, schedule and method for each number of evaluations of {model}, chosen on "
        f"{counted(drawn, 'validation picture')} by the trained reward and measured on "
        f"{counted(len(found[0].best.scores[REWARD]), 'test prompt')}. Brackets hold 95 % intervals; the last column "
        f"is the paired difference to {found[-1].evals} evaluations at their best in the trained reward."
        f"{_shares(found)}"
    )
    write_text(folder / "headroom.md", "\n".join([about, "", *lines, "", said]) + "\n")
    with rc_context(STYLE):
        for metric in told_apart(found):
            name = "headroom" if metric == REWARD else f"headroom_{metric.replace('/', '-')}"
            publish(cost_curve(curves(found, metric), {BEST}, named(metric)), name, folder)
    return [*plain(rows), "", about, f"table and plots: {folder / 'headroom.md'}", said]


def _shares(found: Sequence[Measurement]) -> str:
    """A sentence about the heads that do not judge every test prompt; empty where all do."""
    scores = found[0].best.scores
    counts = {metric: sum(value is not None for value in values) for metric, values in scores.items()}
    fewer = [f"{named(metric)} on {n}" for metric, n in counts.items() if n < len(scores[REWARD])]
    return f" A head counts on the prompts that it judges: {', '.join(fewer)}." if fewer else ""


def told_apart(found: Sequence[Measurement]) -> list[str]:
    """The metrics, without a head that is the trained reward itself."""
    alone = [all(one.best.scores[m] == one.best.scores[REWARD] for one in found) for m in found[0].best.scores]
    return [m for m, same in zip(found[0].best.scores, alone, strict=True) if m == REWARD or not same]


def table(found: Sequence[Measurement]) -> list[list[str]]:
    """A row for each number of evaluations, with the header first."""
    metrics, last = told_apart(found), found[-1]
    measured = any(one.best.frechet_distance is not None for one in found)
    distance = ["Frechet"] if measured else []
    rows = [["evals", "passes", "method", "settings", *map(named, metrics), *distance, f"minus {last.evals}"]]
    for one in found:
        best, means = one.best, one.best.means
        settings = Tuned(chosen=best.rival, images=0, candidates=0).settings
        cells = [_told(means[metric]) for metric in metrics]
        if measured:
            cells.append("-" if best.frechet_distance is None else f"{best.frechet_distance:.3g}")
        gap = "" if one is last else _told(difference(one, last), signed=True)
        rows.append([str(one.evals), str(best.network_passes), best.label, settings, *cells, gap])
    return rows


def curves(found: Sequence[Measurement], metric: str) -> dict[str, list[Measured]]:
    """The best of all methods, and each method where it was among the finalists, against network passes."""
    lines: dict[str, list[Measured]] = {BEST: [_measured(one.best, metric) for one in found]}
    every: dict[str, list[Measured]] = {}
    for one in found:
        for point in one.points:
            every.setdefault(point.label, []).append(_measured(point, metric))
    return lines | dict(sorted(every.items(), key=lambda item: -len(item[1])))


def _measured(point: Point, metric: str) -> Measured:
    mean = bootstrap_mean(judged(_floats(point.scores[metric])))
    return Measured({"network passes": point.network_passes}, mean.mean, mean.low, mean.high)


def difference(one: Measurement, last: Measurement) -> Interval:
    """The paired difference in the trained reward: a number of evaluations minus the reference."""
    return paired_difference(_floats(one.best.scores[REWARD]), _floats(last.best.scores[REWARD]))


def verdict(found: Sequence[Measurement]) -> str:
    """Whether the model has room for better solvers.

    It has, if FEW evaluations at their best lie below the reference by HALF_WIDTHS half widths of the interval in the
    trained reward and have TIMES its Frechet distance, MORE evaluations lie below it with an interval clear of 0, and
    the best guidance lies within GUIDANCE.
    """
    by_evals, last = {one.evals: one for one in found}, found[-1]
    if missing := [str(n) for n in (FEW, MORE) if n not in by_evals or n == last.evals]:
        return f"no verdict: it needs {' and '.join(missing)} evaluations below the reference (--evals)"
    few, more = by_evals[FEW], by_evals[MORE]
    gap, later = difference(few, last), difference(more, last)
    half = (gap.high - gap.low) / 2
    widths = -gap.mean / half if half else math.inf * np.sign(-gap.mean) if gap.mean else 0.0
    checks = [
        (widths >= HALF_WIDTHS, f"{FEW} evaluations are {_told(gap, signed=True)} from {last.evals}, {widths:.1f} half "
         f"widths below (at least {HALF_WIDTHS:g} wanted)"),
        (later.high < 0, f"{MORE} are {_told(later, signed=True)} from it (below 0 wanted)"),
    ]  # fmt: skip
    scales = {n: by_evals[n].best.guidance_scale for n in (FEW, MORE, last.evals)}
    inside = all(GUIDANCE[0] <= scale <= GUIDANCE[1] for scale in scales.values())
    told = ", ".join(f"{scale:g} at {n}" for n, scale in scales.items())
    checks.append((inside, f"the best guidance is {told} evaluations ({GUIDANCE[0]:g} to {GUIDANCE[1]:g} wanted)"))
    distances = few.best.frechet_distance, last.best.frechet_distance
    if distances[0] is not None and distances[1] is not None:
        times = distances[0] / distances[1] if distances[1] > 0 else math.inf
        checks.append((times >= TIMES, f"the Frechet distance is {times:.2g} times as large ({TIMES:g} wanted)"))
    else:
        checks.append((True, "the Frechet distance was not measured (--reference)"))
    passed = all(right for right, _ in checks)
    reasons = "; ".join(("" if right else "NOT: ") + text for right, text in checks)
    return f"{'passes' if passed else 'does not pass'}: {reasons}"


def _told(found: Interval, *, signed: bool = False) -> str:
    mark = "+" if signed else ""
    return f"{found.mean:{mark}.3f} [{found.low:{mark}.3f}, {found.high:{mark}.3f}]"
