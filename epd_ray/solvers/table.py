"""The solver as a table of numbers: where to look along each interval and how to weigh what was seen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from epd_ray.errors import TableError

COLUMN_NAMES = {
    "positions": "positions",
    "weights": "weights",
    "scale_dir": "direction scales",
    "scale_time": "time scales",
}
"""A table's columns, for people."""
_SUM_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class SolverTable:
    """N intervals times K parallel points, one table for all samples or one per sample; checked when made.

    Args:
        positions: [N, K] or [B, N, K], in [0, 1], increasing along K (equal neighbours allowed): r.
        weights: same shape, >= 0, summing to 1 along K: w.
        scale_dir: same shape, > 0: o, a factor on each direction. None stands for ones.
        scale_time: same shape, > 0: c, a factor on each evaluated sigma. None stands for ones.

    Raises:
        TableError: a value that breaks one of these, named with its row.

    Source: EPD-Solver (arXiv 2507.14797).
    """

    positions: Tensor
    weights: Tensor
    scale_dir: Tensor | None = None
    scale_time: Tensor | None = None

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

    @classmethod
    def from_unsorted(
        cls, positions: Tensor, weights: Tensor, scale_dir: Tensor | None = None, scale_time: Tensor | None = None
    ) -> "SolverTable":
        """A table from points in any order; the step does not depend on it.

        Args:
            positions: [N, K] or [B, N, K], in [0, 1].
            weights: same shape, as are the scales.
            scale_dir: see the class.
            scale_time: see the class.

        Returns:
            The table with its points sorted by position within each interval.

        Raises:
            TableError: see the class.
        """
        order = positions.argsort(dim=-1, stable=True)
        columns = (positions, weights, scale_dir, scale_time)
        for values in columns:
            if values is not None and values.shape != positions.shape:
                raise TableError(
                    f"shapes {[list(c.shape) for c in columns if c is not None]} differ, expected one shape"
                )
        return cls(*(None if values is None else values.gather(-1, order) for values in columns))  # type: ignore[arg-type]

    @property
    def intervals(self) -> int:
        """N."""
        return self.positions.shape[-2]

    @property
    def points(self) -> int:
        """K."""
        return self.positions.shape[-1]

    @property
    def batch(self) -> int | None:
        """B, or None where all samples share the table."""
        return self.positions.shape[0] if self.positions.ndim == 3 else None

    @property
    def start_point(self) -> bool:
        """Whether every first point is its interval's start, whose drift is known: it needs no evaluation.

        With K = 1 the solver is Euler, whose steps the direction scales stretch.
        """
        at_start = bool((self.positions[..., 0] == 0).all())
        return at_start and (self.scale_time is None or bool((self.scale_time[..., 0] == 1).all()))

    def known_points(self, interval: int, afs: bool = False) -> int:
        """How many of an interval's first points need no evaluation, 0 or 1.

        Args:
            interval: 0 to N - 1.
            afs: the first drift of all is analytical, not what the network says.
        """
        return int(self.start_point and not (afs and interval == 0))

    def evaluations(self, afs: bool = False) -> int:
        """Drift evaluations a sample: at each interval's start and at its K points, none twice."""
        return sum(1 + self.points - self.known_points(i, afs) for i in range(self.intervals)) - afs

    def depth(self, afs: bool = False) -> int:
        """Parallel NFE, those that wait for each other: at each interval's start, and at its other points at once."""
        return sum(1 + (self.points > self.known_points(i, afs)) for i in range(self.intervals)) - afs

    def to(self, dtype: torch.dtype) -> "SolverTable":
        """The same table in another floating dtype."""
        return SolverTable(**{name: values.to(dtype) for name, values in self.columns().items()})

    def rows(self, start: int, stop: int) -> "SolverTable":
        """The tables [stop - start, N, K] of some samples; `self` is [B, N, K]."""
        return SolverTable(**{name: values[start:stop] for name, values in self.columns().items()})

    def row(self, index: int) -> "SolverTable":
        """The table [N, K] of one sample; `self` is [B, N, K]."""
        return SolverTable(**{name: values[index] for name, values in self.columns().items()})

    def repeat_rows(self, times: int) -> "SolverTable":
        """Each sample's table `times` in a row, [B * times, N, K]; `self` is [B, N, K]."""
        return SolverTable(**{name: values.repeat_interleave(times, 0) for name, values in self.columns().items()})

    def columns(self) -> dict[str, Tensor]:
        """What is there of positions, weights, scale_dir and scale_time."""
        columns = {name: getattr(self, name) for name in COLUMN_NAMES}
        return {name: values for name, values in columns.items() if values is not None}


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


def _repeat(positions: list[float], weights: list[float], num_intervals: int) -> SolverTable:
    rows = torch.tensor([positions, weights], dtype=torch.float64)
    return SolverTable(*rows[:, None].repeat(1, num_intervals, 1))  # [2, N, K]


def _first(mask: Tensor) -> list[int]:
    index: list[int] = mask.nonzero()[0].tolist()
    return index


def _require(good: Tensor, values: Tensor, name: str, expected: str) -> None:
    if not bool(good.all()):
        index = _first(~good)
        raise TableError(f"{name}{index} is {values[tuple(index)].item():g}, expected {expected}")
