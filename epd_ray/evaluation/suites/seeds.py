"""Runs that differ in their seed alone: their means and differences over seeds and prompts together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from epd_ray.drawing.sampler import EPD
from epd_ray.evaluation.comparison import Comparison, Row
from epd_ray.evaluation.statistics import Interval, interval_over, mean_over_seeds
from epd_ray.evaluation.suites.tables import spelled

Runs = Sequence[Sequence[str]]
"""Groups of keys of learned solvers; those of a group come from runs of the same settings with different seeds."""


@dataclass(frozen=True)
class OverSeeds:
    """What the runs of a group have in common.

    Attributes:
        solvers: the keys of their solvers, at least two.
        label: the group's name for people.
        means: metric -> the mean over seeds and prompts with its interval.
        differences: key of a solver that is not learned -> metric -> the mean of ours minus its, prompt by prompt.
    """

    solvers: tuple[str, ...]
    label: str
    means: Mapping[str, Interval]
    differences: Mapping[str, Mapping[str, Interval]]

    @property
    def over(self) -> str:
        """What the intervals are over, for people."""
        return interval_over(len(self.solvers))


def over_seeds(runs: Runs, comparison: Comparison) -> list[OverSeeds]:
    """Sum up each group of runs, which all drew the same prompts from the same noise.

    Args:
        runs: the groups; those of a single run are left out, because they say nothing about other seeds.
        comparison: every metric for each prompt.
    """
    by_key = {row.sampler.key: row for row in comparison.rows}
    rivals = [row for row in comparison.rows if row.sampler.kind != EPD]
    found = []
    for keys in runs:
        if len(keys) > 1:
            ours = [by_key[key] for key in keys]
            label = f"{len(keys)} seeds of {ours[0].sampler.label}"
            differences = {row.sampler.key: _means(ours, row) for row in rivals}
            found.append(OverSeeds(tuple(keys), label, _means(ours), differences))
    return found


def _means(ours: Sequence[Row], other: Row | None = None) -> dict[str, Interval]:
    """Metric -> the mean of ours, minus the other's if there is one, over seeds and prompts."""
    found = {}
    for metric, first in ours[0].values.items():
        table = np.array([row.values[metric] for row in ours], np.float64)  # [S, P]
        less = np.zeros_like(first) if other is None else other.values[metric]
        judged = (table - less)[:, ~np.isnan(first)]
        found[metric] = mean_over_seeds(judged, same_prompts=True)
    return found


def seeds_grid(found: Sequence[OverSeeds], comparison: Comparison) -> list[list[str]]:
    """The groups as rows of text, with the header first: means, then differences to each solver that is not learned."""
    names = {row.key: f"{row.label} ({row.costs[-1]})" for row in comparison.evaluation.solvers}
    metrics = list(comparison.rows[0].values)
    rows = [["over seeds and prompts", *(metric.replace("_", " ") for metric in metrics)]]
    for group in found:
        rows.append([group.label, *(spelled(m, group.means[m]) for m in metrics)])
        for key, by in group.differences.items():
            rows.append([f"  minus {names[key]}", *(spelled(m, by[m], True) for m in metrics)])
    return rows
