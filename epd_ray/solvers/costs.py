"""What a picture costs by solver: the one place where evaluations and network passes are counted, without torch."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

MAX_HISTORY = 3
"""The largest number of earlier intervals whose drifts a table may weigh."""


@dataclass(frozen=True)
class Cost:
    """The evaluations of the drift that one picture takes.

    Attributes:
        parallel_nfe: the longest chain of evaluations that wait for each other.
        model_evals: all evaluations.
        unguided_evals: those of them that take one pass of the network at any guidance scale of the model, because the
            table switches their guidance off or uses that of an earlier evaluation.
    """

    parallel_nfe: int
    model_evals: int
    unguided_evals: int = 0

    def network_passes(self, guidance_scale: float | None, classifier_free: bool | None) -> int | None:
        """The passes of the network that one picture takes.

        Args:
            guidance_scale: the guidance scale; None if it is not known.
            classifier_free: see `passes_per_eval`; None if it is not known.

        Returns:
            The number of passes; None if it depends on what is not known.
        """
        if classifier_free is None:
            unguided = guidance_scale is not None and passes_per_eval(guidance_scale, classifier_free=True) == 1
            return self.model_evals if unguided else None
        if guidance_scale is None:
            return None if classifier_free else self.model_evals
        guided = self.model_evals - self.unguided_evals
        return guided * passes_per_eval(guidance_scale, classifier_free=classifier_free) + self.unguided_evals

    def passes_by(self, meta: Mapping[str, JsonValue]) -> int | None:
        """The passes of the network by what a solver file says of its model; None if it does not say enough."""
        scale, free = meta.get("guidance_scale"), meta.get("classifier_free")
        known = float(scale) if isinstance(scale, (int, float)) else None
        return self.network_passes(known, free if isinstance(free, bool) else None)


def passes_per_eval(guidance_scale: float, *, classifier_free: bool) -> int:
    """The passes of the network in one evaluation of the drift: 2 with classifier-free guidance, and 1 without.

    Args:
        guidance_scale: the guidance scale, at least 0; a scale of at most 1 is no guidance.
        classifier_free: whether the model's guidance asks the network again without the prompt; a network that takes
            the scale as an input does not.
    """
    return 2 if classifier_free and guidance_scale > 1 else 1


def has_start_point(first_positions: Iterable[float], first_time_scales: Iterable[float] = ()) -> bool:
    """Whether the first point of every interval is the interval's start, whose drift the solver already knows.

    Args:
        first_positions: the position of each interval's first point.
        first_time_scales: the time scale of each interval's first point; empty where the table has none.
    """
    return all(position == 0 for position in first_positions) and all(scale == 1 for scale in first_time_scales)


def known_points(interval: int, *, start_point: bool, afs: bool = False) -> int:
    """How many of an interval's first points need no evaluation, 0 or 1.

    Args:
        interval: index of the interval, from 0 to N - 1.
        start_point: see `has_start_point`.
        afs: whether the very first drift is analytical. The network has then not been asked at the first start.
    """
    return int(start_point and not (afs and interval == 0))


def table_cost(
    intervals: int, points: int, *, start_point: bool, afs: bool = False, unguided: Collection[int] = ()
) -> Cost:
    """The cost of a solver table: one evaluation at each interval's start, then all its other points at once.

    Args:
        intervals: N, at least 1.
        points: K, at least 1.
        start_point: see `has_start_point`.
        afs: whether the first drift is analytical, which saves one evaluation.
        unguided: the intervals whose evaluations take one pass of the network each.
    """
    inner = [points - known_points(i, start_point=start_point, afs=afs) for i in range(intervals)]
    evals = [1 + count - (afs and i == 0) for i, count in enumerate(inner)]
    chain = sum(1 + (count > 0) for count in inner) - afs
    return Cost(chain, sum(evals), sum(evals[i] for i in unguided))


def sequential_cost(intervals: int, evals: int, last_evals: int | None = None, *, afs: bool = False) -> Cost:
    """The cost of a method whose evaluations all wait for each other.

    Args:
        intervals: N, at least 1.
        evals: evaluations per interval.
        last_evals: evaluations of the last interval; None means `evals`.
        afs: whether the first drift is analytical, which saves one evaluation.
    """
    count = evals * (intervals - 1) + (evals if last_evals is None else last_evals) - afs
    return Cost(count, count)


def fewest_intervals(parallel_nfe: int, evals: int, last_evals: int | None = None) -> int:
    """The smallest N, at least 1, with which a sequential method takes at least `parallel_nfe` evaluations."""
    short = max(0, parallel_nfe - sequential_cost(1, evals, last_evals).parallel_nfe)
    return 1 - (-short // evals)
