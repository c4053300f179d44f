"""The solver as a table of numbers: where in each interval the drift is evaluated, and how the drifts are combined.

Beside the points of each interval a table may hold, each part on its own: the intervals themselves (`grid`), weights of
the drifts of earlier intervals (`history`), a guidance scale for each interval (`guidance`), and the intervals that
take the effect of guidance from an earlier one (`reuse`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.errors import TableError
from epd_ray.solvers.costs import MAX_HISTORY, Cost, has_start_point, known_points, table_cost

Rows = list[list[float]]
"""A column [N, K] as it stands in a file."""

COLUMN_NAMES = {
    "positions": "positions",
    "weights": "weights",
    "scale_dir": "direction scales",
    "scale_time": "time scales",
}
"""Every column with a value for each point, in order, with its name for people: the one list of these columns."""

INTERVAL_NAMES = {"grid": "shares of the grid", "history": "history", "guidance": "guidance scale"}
"""Every column with values for each interval, in order, with its name for people: the one list of these columns."""
PARTS = (*COLUMN_NAMES, *INTERVAL_NAMES, "reuse")
_SUM_TOLERANCE = 1e-4
SMALLEST_SHARE = 1e-5  # of an interval in the grid

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SolverTable:
    """N intervals with K parallel points each; one table for all samples or one per sample; checked when made.

    Args:
        positions: r, [N, K] or [B, N, K], in [0, 1], not decreasing along K: where in its interval each point is, from
            0 (start) to 1 (end).
        weights: w, of the same shape, >= 0, with sum 1 along K.
        scale_dir: o, of the same shape, > 0, a factor on each point's drift. None stands for ones.
        scale_time: c, of the same shape, > 0, a factor on the sigma of each point's evaluation. None stands for ones.
        grid: g, [N] or [B, N], > 0, with sum 1: the share of each interval in the sigma schedule that the solver is run
            on, see `epd_ray.solvers.grid.regrid`. None stands for equal shares, which change nothing.
        history: h, [N, H] or [B, N, H] with H at most 3, any sign: the slope of interval i gains h[i, j] times the
            difference of its own first drift and that of interval i - j - 1. Where there is no such interval, the
            entry is 0. None stands for zeros.
        guidance: s, [N] or [B, N], > 0, the guidance scale of each interval's evaluations. None stands for the scale
            that the model is run with.
        reuse: [N], bool, the same for all samples: whether an interval's evaluations leave out the pass without the
            prompt, and take the difference that the prompt makes from the last evaluation that had both; never the
            first. None stands for no interval.

    Raises:
        TableError: a value breaks one of these rules; the message names it with its row.

    Source: EPD-Solver (arXiv 2507.14797).
    """

    positions: Tensor
    weights: Tensor
    scale_dir: Tensor | None = None
    scale_time: Tensor | None = None
    grid: Tensor | None = None
    history: Tensor | None = None
    guidance: Tensor | None = None
    reuse: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.positions.shape)
        if self.positions.ndim not in (2, 3) or 0 in shape:
            raise TableError(f"positions have shape {list(shape)}, expected [N, K] or [B, N, K], all at least 1")
        for name, values in self.columns().items():
            if tuple(values.shape) != shape:
                raise TableError(f"{name} has shape {list(values.shape)}, expected that of positions: {list(shape)}")
            if not values.is_floating_point():
                raise TableError(f"{name} has dtype {values.dtype}, expected a floating one")
            _require(values.isfinite(), values, name, "a finite number")
        r, w = self.positions, self.weights
        _require((r >= 0) & (r <= 1), r, "positions", "a value in [0, 1]")
        descents = (r.diff(dim=-1) < 0).any(-1)
        if bool(descents.any()):
            row = _first(descents)
            raise TableError(f"positions{row} is {r[tuple(row)].tolist()}, expected increasing (use from_unsorted)")
        _require(w >= 0, w, "weights", "at least 0")
        sums = w.double().sum(-1)
        off = (sums - 1).abs() > _SUM_TOLERANCE
        if bool(off.any()):
            row = _first(off)
            total = sums[tuple(row)].item()
            raise TableError(f"weights{row} sums to {total:.6g}, expected 1 (pass normalised weights)")
        for name in ("scale_dir", "scale_time"):
            if (scale := self.columns().get(name)) is not None:
                _require(scale > 0, scale, name, "above 0")
        self._check_intervals()

    def _check_intervals(self) -> None:
        rows = tuple(self.positions.shape[:-1])  # [N] or [B, N]
        for name, values in self.interval_columns().items():
            if tuple(values.shape[: len(rows)]) != rows or values.ndim != len(rows) + (name == "history"):
                wanted = str([*rows, "H"] if name == "history" else [*rows]).replace("'", "")
                raise TableError(f"{name} has shape {list(values.shape)}, expected {wanted}")
            if not values.is_floating_point():
                raise TableError(f"{name} has dtype {values.dtype}, expected a floating one")
            _require(values.isfinite(), values, name, "a finite number")
        if self.grid is not None:
            _require(self.grid >= SMALLEST_SHARE, self.grid, "grid", f"at least {SMALLEST_SHARE:g} (two sigmas meet)")
            total = self.grid.double().sum(-1)
            if bool((off := (total - 1).abs() > _SUM_TOLERANCE).any()):
                raise TableError(
                    f"grid sums to {total[off].flatten()[0].item():.6g}, expected 1 (pass normalised shares)"
                )
        if self.guidance is not None:
            _require(self.guidance > 0, self.guidance, "guidance", "above 0")
        if self.history is not None:
            depth = self.history.shape[-1]
            if not 1 <= depth <= MAX_HISTORY:
                raise TableError(f"history has {depth} entries an interval, expected 1 to {MAX_HISTORY}")
            first = torch.arange(self.intervals)[:, None] <= torch.arange(depth)
            missing = (self.history != 0) & first.to(self.history.device)
            _require(~missing, self.history, "history", "0, because there is no earlier interval")
        if self.reuse is not None:
            found: list[bool] = self.reuse.tolist()
            if self.reuse.dtype != torch.bool or len(found) != self.intervals or found[0]:
                expected = f"{self.intervals} truth values, the first false, because nothing is known there"
                raise TableError(f"reuse is {found}, expected {expected}")
            both = [i for i in range(self.intervals) if i not in self.unguided]
            if early := [i for i in self.reused if not both or i < both[0]]:
                raise TableError(f"reuse[{early[0]}] is true, but no interval before it makes both passes")

    @classmethod
    def from_unsorted(cls, positions: Tensor, weights: Tensor, **scales: Tensor | None) -> "SolverTable":
        """A table whose points are given in any order; the solver's step does not depend on that order.

        Args:
            positions: [N, K] or [B, N, K], in [0, 1].
            weights: of the same shape, as are the scales.
            scales: the other columns by name; None is the same as leaving one out.

        Returns:
            The table, its points sorted by position within each interval.

        Raises:
            TableError: a shape that differs, or a value that the class refuses.
        """
        order = positions.argsort(dim=-1, stable=True)
        columns = {"positions": positions, "weights": weights, **_present(scales)}
        if any(values.shape != positions.shape for values in columns.values()):
            raise TableError(f"shapes {[list(c.shape) for c in columns.values()]} differ, expected one shape")
        return cls(**{name: values.gather(-1, order) for name, values in columns.items()})

    @classmethod
    def from_lists(cls, columns: Mapping[str, Any]) -> "SolverTable":
        """The table [N, K], float64, of columns as a file has them; the inverse of `to_lists`.

        Args:
            columns: by the name of the column N rows of K numbers, N rows of H for the history, or N values; None is
                the same as leaving a column out.

        Raises:
            TableError: rows of different lengths, or a value that the class refuses.
        """
        return cls(**{name: _tensor(name, rows) for name, rows in _present(columns).items()})

    @property
    def intervals(self) -> int:
        """N, the number of intervals."""
        return self.positions.shape[-2]

    @property
    def points(self) -> int:
        """K, the number of points per interval."""
        return self.positions.shape[-1]

    @property
    def batch(self) -> int | None:
        """B, the number of samples with a table of their own; None where all samples share one table."""
        return self.positions.shape[0] if self.positions.ndim == 3 else None

    @property
    def start_point(self) -> bool:
        """Whether the first point of every interval is the interval's start, so that it needs no evaluation of its own.

        With K = 1 the solver is then the Euler method, its steps multiplied by the direction scales.
        """
        first = [None if c is None else c[..., 0].flatten().tolist() for c in (self.positions, self.scale_time)]
        return has_start_point(first[0] or (), first[1] or ())

    def known_points(self, interval: int, afs: bool = False) -> int:
        """How many of an interval's first points need no evaluation, 0 or 1; see `costs.known_points`."""
        return known_points(interval, start_point=self.start_point, afs=afs)

    def cost(self, afs: bool = False) -> Cost:
        """Evaluations of the drift per picture; `afs` says whether the first drift is analytical."""
        start = self.start_point
        return table_cost(self.intervals, self.points, start_point=start, afs=afs, unguided=self.unguided)

    @property
    def depth(self) -> int:
        """The number of drifts at intervals' starts that an interval combines: its own, and those of its history."""
        return 1 if self.history is None else 1 + self.history.shape[-1]

    @property
    def unguided(self) -> list[int]:
        """The intervals whose evaluations take one pass: those that reuse, and those whose scale is 1 or less."""
        if self.guidance is None:
            return self.reused
        low = (self.guidance.reshape(-1, self.intervals) <= 1).all(0).tolist()
        return [i for i in range(self.intervals) if low[i] or i in self.reused]

    @property
    def reused(self) -> list[int]:
        """The intervals that take the difference that the prompt makes from an earlier evaluation."""
        return [] if self.reuse is None else [i for i, reused in enumerate(self.reuse.tolist()) if reused]

    @property
    def guides(self) -> bool:
        """Whether the table decides about guidance."""
        return self.guidance is not None or bool(self.reused)

    def to(self, dtype: torch.dtype) -> "SolverTable":
        """The same table in another floating dtype."""
        return self._each(lambda values: values.to(dtype))

    def rows(self, start: int, stop: int) -> "SolverTable":
        """The tables [stop - start, N, K] of the samples from `start` on; `self` is [B, N, K]."""
        return self._each(lambda values: values[start:stop])

    def row(self, index: int) -> "SolverTable":
        """The table [N, K] of one sample; `self` is [B, N, K]."""
        return self._each(lambda values: values[index])

    def repeat_rows(self, times: int) -> "SolverTable":
        """Each sample's table `times` in a row, [B * times, N, K]; `self` is [B, N, K]."""
        return self._each(lambda values: values.repeat_interleave(times, 0))

    def columns(self) -> dict[str, Tensor]:
        """The columns that this table has, by name, in the order of COLUMN_NAMES."""
        return _present({name: getattr(self, name) for name in COLUMN_NAMES})

    def interval_columns(self) -> dict[str, Tensor]:
        """The columns with values for each interval that this table has, by name, in the order of INTERVAL_NAMES."""
        return _present({name: getattr(self, name) for name in INTERVAL_NAMES})

    def tensors(self) -> dict[str, Tensor]:
        """Every part that this table has, by name, in the order of PARTS."""
        return self.columns() | self.interval_columns() | _present({"reuse": self.reuse})

    def to_lists(self) -> dict[str, JsonValue]:
        """The table as lists, as a file has them: None for a column of points that is absent; other parts may miss."""
        return dict.fromkeys(COLUMN_NAMES) | {name: values.tolist() for name, values in self.tensors().items()}

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SolverTable":
        columns = self.columns() | self.interval_columns()
        return SolverTable(**{name: change(values) for name, values in columns.items()}, reuse=self.reuse)


def dpm2_table(num_intervals: int) -> SolverTable:
    """DPM-Solver-2: one point at the geometric midpoint.

    Args:
        num_intervals: N, >= 1.

    Returns:
        Table [N, 1], float64.

    Source: DPM-Solver (arXiv 2206.00927), algorithm 1.
    """
    return _repeat([0.5], [1.0], num_intervals)


def heun_table(num_intervals: int) -> SolverTable:
    """Heun's method: the mean of the drifts at both ends.

    Args:
        num_intervals: N, >= 1.

    Returns:
        Table [N, 2], float64.

    Source: EDM (arXiv 2206.00364), algorithm 1.
    """
    return _repeat([0.0, 1.0], [0.5, 0.5], num_intervals)


def uniform_table(intervals: int, points: int, start_point: bool = False) -> SolverTable:
    """Evenly spaced positions with equal weights: the table from which a run starts without stage 1.

    Args:
        intervals: N, >= 1.
        points: K, the points per interval, >= 1.
        start_point: whether the first point of each interval is the interval's start.

    Returns:
        Table [N, K], float64.
    """
    segments = points + 1 - start_point
    positions = torch.arange(1 - start_point, segments, dtype=torch.float64) / segments
    return SolverTable(positions.repeat(intervals, 1), torch.full((intervals, points), 1 / points, dtype=torch.float64))


def _repeat(positions: list[float], weights: list[float], num_intervals: int) -> SolverTable:
    rows = torch.tensor([positions, weights], dtype=torch.float64)
    return SolverTable(*rows[:, None].repeat(1, num_intervals, 1))  # [2, N, K]


def _present(columns: Mapping[str, T | None]) -> dict[str, T]:
    return {name: values for name, values in columns.items() if values is not None}


def _tensor(name: str, rows: Sequence[Any]) -> Tensor:
    lengths = sorted({len(row) for row in rows if isinstance(row, list)})
    if len(lengths) > 1:
        raise TableError(f"{name} has rows of {lengths} values, expected one length")
    return torch.tensor(rows, dtype=torch.bool if name == "reuse" else torch.float64)


def _first(mask: Tensor) -> list[int]:
    index: list[int] = mask.nonzero()[0].tolist()
    return index


def _require(good: Tensor, values: Tensor, name: str, expected: str) -> None:
    if not bool(good.all()):
        index = _first(~good)
        raise TableError(f"{name}{index} is {values[tuple(index)].item():g}, expected {expected}")
