"""What a comparison shows, in a sentence and a small table: a learned solver against many steps and the best rivals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from epd_ray.drawing.sampler import EPD
from epd_ray.evaluation.records import Evaluation, SolverRow
from epd_ray.evaluation.statistics import Interval
from epd_ray.evaluation.wording import (
    LABEL,
    NOTHING,
    WIDTH,
    decimals,
    difference,
    duration,
    listed,
    mean,
    named,
    plain,
    wrapped,
)
from epd_ray.telemetry.progress import counted


@dataclass(frozen=True)
class Speed:
    """The times of two solvers that can be compared with each other.

    Attributes:
        ours: seconds a picture of the first solver.
        other: seconds a picture of the second solver.
    """

    ours: float
    other: float

    @property
    def ratio(self) -> float:
        """The first solver's time as a multiple of the second's."""
        return self.ours / self.other


Timing = Callable[[SolverRow, SolverRow], Speed | None]
"""Compares the times of two solvers; None where their times cannot be compared."""


@dataclass(frozen=True)
class Against:
    """A learned solver against one other.

    Attributes:
        other: the other solver.
        name: what the other solver is, for people.
        differences: metric -> the paired difference, learned minus other, of the metrics of which more is better.
        speed: the times of both; None if they cannot be compared.
    """

    other: SolverRow
    name: str
    differences: Mapping[str, Interval]
    speed: Speed | None


@dataclass(frozen=True)
class Verdict:
    """What a learned solver gains or loses.

    Attributes:
        ours: the learned solver.
        against: the reference, and the best rival with as many network passes, as far as they were compared.
        sentence: all of this for people.
    """

    ours: SolverRow
    against: tuple[Against, ...]
    sentence: str


def drawn_alike(ours: SolverRow, other: SolverRow) -> Speed | None:
    """Compare the times of two solvers that drew in turns."""
    if ours.seconds_per_image is None or other.seconds_per_image is None or other.seconds_per_image <= 0:
        return None
    return Speed(ours.seconds_per_image, other.seconds_per_image)


def verdicts(evaluation: Evaluation, timing: Timing = drawn_alike) -> list[Verdict]:
    """A verdict on each learned solver that the evaluation is about; none if it has no metric of which more is better.

    Args:
        evaluation: the results.
        timing: compares the times of two of its solvers.
    """
    if not evaluation.scores:
        return []
    return [_verdict(evaluation, ours, timing) for ours in _ours(evaluation)]


def _verdict(evaluation: Evaluation, ours: SolverRow, timing: Timing) -> Verdict:
    others: dict[str, tuple[SolverRow, str]] = {}
    if reference := evaluation.solver(evaluation.reference or ""):
        others[reference.key] = reference, f"{reference.intervals} steps of {reference.label}"
    if equal := rivals_at(evaluation, ours, evaluation.equal_cost):
        best, count = equal[0], equal[0].costs[-1]
        which = f"the best of {len(equal)} rivals with {count}, {best.label}," if len(equal) > 1 else ""
        others.setdefault(best.key, (best, which or f"{best.label} with {count}"))
    against = []
    for other, name in others.values():
        if scores := _scores(evaluation, ours.key, other.key):
            against.append(Against(other, name, scores, timing(ours, other)))
    return Verdict(ours, tuple(against), _sentence(evaluation, ours, against))


def against_start(evaluation: Evaluation, start: str) -> str | None:
    """A sentence about a run's solver against the table that reinforcement learning began with.

    Args:
        evaluation: the results.
        start: the key of that table's solver.

    Returns:
        The sentence; None if the two were not compared.
    """
    learned = _ours(evaluation)
    found = _scores(evaluation, learned[0].key, start) if learned else {}
    return f"It is {_compared(evaluation, found, 'the table that it began with')}." if found else None


def rivals_at(evaluation: Evaluation, ours: SolverRow, cost: str) -> list[SolverRow]:
    """The solvers that are not learned and cost as much as a learned one, the best in the first metric first.

    Args:
        evaluation: the results.
        ours: the learned solver.
        cost: "parallel_nfe", "model_evals" or, if it is known of all, "network_passes". Where no solver costs the same,
            those with the next larger cost count.
    """
    least = getattr(ours, cost)
    rivals = [row for row in evaluation.solvers if row.kind != EPD and getattr(row, cost) >= least]
    rivals = [row for row in rivals if row.key != evaluation.reference or getattr(row, cost) == least]
    least = min((getattr(row, cost) for row in rivals), default=0)
    equal = [row for row in rivals if getattr(row, cost) == least]
    metric = evaluation.scores[0]
    return sorted((row for row in equal if metric in row.metrics), key=lambda row: -row.metrics[metric].mean)


def principal(evaluation: Evaluation) -> list[SolverRow]:
    """The solvers to show first: the learned ones, the reference, and the best rivals at equal cost."""
    ours = _ours(evaluation)
    rows = [*ours, *(row for row in evaluation.solvers if row.kind == EPD)]
    rows += [row for row in evaluation.solvers if row.key == evaluation.reference]
    if evaluation.scores:
        for cost, learned in product(("parallel_nfe", evaluation.equal_cost), ours):
            rows += rivals_at(evaluation, learned, cost)[:1]
    return list({row.key: row for row in rows}.values())


def ordered(evaluation: Evaluation) -> list[SolverRow]:
    """All solvers: the principal ones, then the others as they were drawn."""
    return list({row.key: row for row in [*principal(evaluation), *evaluation.solvers]}.values())


def closing(evaluation: Evaluation) -> list[str]:
    """The last lines of a run: a sentence with the verdict, and a small table of the solvers that it is about."""
    said = [line for v in verdicts(evaluation) for line in wrapped(v.sentence, WIDTH).split("\n")]
    return [*said, "", *plain(small_table(evaluation)), "", *wrapped(about_table(evaluation), WIDTH).split("\n")]


def small_table(evaluation: Evaluation) -> list[list[str]]:
    """The principal solvers as rows of text, with the header first."""
    places = {metric: decimals(evaluation, metric) for metric in evaluation.metrics}
    found = [["solver", "parallel\nNFE", "evals", "passes", *map(named, evaluation.metrics), "time per\npicture"]]
    for row in principal(evaluation):
        scores = (mean(metric, row.metrics.get(metric), places[metric]) for metric in evaluation.metrics)
        costs = [NOTHING if cost is None else str(cost) for cost in row.numbers]
        found.append([wrapped(row.label, LABEL), *costs, *scores, duration(row.seconds_per_image)])
    return found


def about_table(evaluation: Evaluation) -> str:
    """Say which rivals the small table shows, and how many solvers it leaves out."""
    said, groups = "Brackets hold 95 % intervals.", []
    for ours in _ours(evaluation) if evaluation.scores else []:
        if equal := rivals_at(evaluation, ours, "parallel_nfe"):
            groups.append(f"the {len(equal)} at parallel NFE {equal[0].parallel_nfe}")
        if equal := rivals_at(evaluation, ours, evaluation.equal_cost):
            groups.append(f"the {len(equal)} with {equal[0].costs[-1]}")
    if groups:
        said += f" Rivals are the best in {named(evaluation.scores[0])} of {listed(list(dict.fromkeys(groups)))}."
    if settings := tuned_settings(evaluation):
        said += f" {settings}"
    left_out = len(evaluation.solvers) - len(principal(evaluation))
    return said + (f" The report also has {counted(left_out, 'other solver')}." if left_out else "")


def tuned_settings(evaluation: Evaluation) -> str:
    """A sentence about how the solvers to show first came to their settings; empty if none was tuned."""
    tuned = [(row, row.tuned) for row in principal(evaluation) if row.tuned is not None]
    if not tuned:
        return ""
    most = max(found.images for _, found in tuned)
    settings = [f"{row.label} ({row.costs[1]}): {found.settings or 'as it comes'}" for row, found in tuned]
    return f"Settings were chosen on at most {most} validation pictures each. {'; '.join(settings)}."


def _sentence(evaluation: Evaluation, ours: SolverRow, against: Sequence[Against]) -> str:
    guidance = "" if evaluation.guidance_scale is None else f" at guidance scale {evaluation.guidance_scale:g}"
    where = f"On {counted(evaluation.prompts, 'prompt')}{guidance},"
    costs = ", ".join(ours.costs)
    if not against:
        return f"{where} {ours.label} ({costs}) was compared with no other solver."
    said = "; it is ".join(_said(evaluation, one) for one in against)
    return f"{where} {ours.label} ({costs}) is {said}."


def _said(evaluation: Evaluation, against: Against) -> str:
    said = _compared(evaluation, against.differences, against.name)
    if against.speed is None:
        return f"{said} (their times cannot be compared)"
    return f"{said}, and takes {duration(against.speed.ours)} per picture against {duration(against.speed.other)}"


def _compared(evaluation: Evaluation, differences: Mapping[str, Interval], name: str) -> str:
    """Say how a learned solver compares with another, with the metrics that agree beside each other."""
    groups: dict[str, list[str]] = {}
    for metric, found in differences.items():
        written = difference(metric, found, decimals(evaluation, metric))
        groups.setdefault(word(found), []).append(f"{named(metric)} ({written})")
    (first, metrics), *rest = groups.items()
    return listed([f"{first} {name} in {listed(metrics)}", *(f"{w} it in {listed(metrics)}" for w, metrics in rest)])


def _scores(evaluation: Evaluation, ours: str, other: str) -> dict[str, Interval]:
    """The differences of two solvers in the metrics of which more is better."""
    found = evaluation.differences_of(ours, other)
    return {metric: found[metric] for metric in evaluation.scores if metric in found}


def word(found: Interval) -> str:
    """What the interval of a difference says: "better than", "worse than", or "level with" where it contains 0."""
    return "better than" if found.low > 0 else "worse than" if found.high < 0 else "level with"


def _ours(evaluation: Evaluation) -> list[SolverRow]:
    return [row for key in evaluation.ours if (row := evaluation.solver(key))]
