"""Which intervals leave out the pass without the prompt: those where what the prompt changes has changed least.

An interval that reuses the difference of an earlier one moves its next state by (b - a) (s - 1) times the change of the
difference, with s its guidance scale. The squares of these, along the student's own states, are the costs; the
intervals that make both passes are the stops of the cheapest way through the schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epd_ray.errors import TableError
from epd_ray.stage_one.grid import best_path
from epd_ray.stage_one.least_squares import Matrix
from epd_ray.stage_one.shard import State


@dataclass(frozen=True)
class Changes:
    """How far the difference that the prompt makes is apart between the starts of N intervals; of shards, or their sum.

    Attributes:
        distance: [N, N], squared distances.
        passes: the network passes that it took.
    """

    distance: Matrix
    passes: int = 0

    def __add__(self, other: "Changes") -> "Changes":
        return Changes(self.distance + other.distance, self.passes + other.passes)


def changes(states: Sequence[State]) -> Changes:
    """The squared distances of the differences at the starts of N intervals, summed over prompts.

    Raises:
        TableError: the model has no such difference, because its network takes the guidance scale as an input.
    """
    found = [state.difference for state in states]
    known = [d.cpu().double().flatten() for d in found if d is not None]
    if len(known) < len(found):
        raise TableError("the model makes no pass without the prompt that could be left out: set solver.reuse=0")
    return Changes(np.array([[float((a - b).square().sum()) for a in known] for b in known]))


def best_reuse(distance: Matrix, widths: Sequence[float], scales: Sequence[float], count: int) -> tuple[int, ...]:
    """The intervals, counted from 0, that reuse; never the first.

    Args:
        distance: [N, N], see `Changes`.
        widths: [N], the width of each interval in sigma, any sign.
        scales: [N], the guidance scale of each interval.
        count: how many intervals reuse, from 0 to N - 1.
    """
    size = len(widths)
    harm = distance * (np.asarray(widths) * (np.asarray(scales) - 1)) ** 2  # [from, to]
    costs = np.full((size + 1, size + 1), np.inf)
    for i in range(size):
        costs[i, i + 1 :] = np.concatenate([[0.0], harm[i, i + 1 :].cumsum()])
    stops = best_path(costs, size - count)
    return tuple(i for i in range(size) if i not in stops)
