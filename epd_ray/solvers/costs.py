"""What a picture costs by solver: the one place where evaluations are counted. Torch is not imported here."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The evaluations of the drift that one picture takes.

    Attributes:
        parallel_nfe: the longest chain of evaluations that wait for each other.
        model_evals: all evaluations. With classifier-free guidance each one is two passes of the network.
    """

    parallel_nfe: int
    model_evals: int


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


def table_cost(intervals: int, points: int, *, start_point: bool, afs: bool = False) -> Cost:
    """The cost of a solver table: one evaluation at each interval's start, then all its other points at once.

    Args:
        intervals: N, at least 1.
        points: K, at least 1.
        start_point: see `has_start_point`.
        afs: whether the first drift is analytical, which saves one evaluation.
    """
    inner = [points - known_points(i, start_point=start_point, afs=afs) for i in range(intervals)]
    return Cost(sum(1 + (count > 0) for count in inner) - afs, sum(1 + count for count in inner) - afs)


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
