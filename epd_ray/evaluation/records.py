"""The form of evaluation.json: each solver's costs and means, and the paired differences between solvers."""

from dataclasses import dataclass

from pydantic import BaseModel

from epd_ray.evaluation.statistics import Interval

SHEET_COLUMNS = 8
"""The largest number of solvers that a contact sheet shows side by side."""


class SolverRow(BaseModel):
    """One solver's costs and mean scores.

    Attributes:
        key: the solver's name in files and folders.
        label: the solver's name for people.
        kind: "epd", or the name of a method in epd_ray.solvers.zoo.
        schedule: "model" for the model's own sigmas, or the name of a sigma schedule.
        intervals: the number of intervals.
        parallel_nfe: the length of the longest chain of evaluations that wait for each other.
        model_evals: the number of all evaluations.
        seconds_per_image: the mean time of a picture in seconds; None if it was not measured.
        metrics: the mean of each metric over the prompts, with its 95 % interval.
    """

    key: str
    label: str
    kind: str
    schedule: str | None = None
    intervals: int
    parallel_nfe: int
    model_evals: int
    seconds_per_image: float | None = None
    metrics: dict[str, Interval]


class Difference(BaseModel):
    """The mean over the prompts of one solver's metric minus another's, with its 95 % interval.

    Attributes:
        metric: the name of the metric.
        solver: the key of the first solver.
        against: the key of the solver that is subtracted.
        mean: the mean difference.
        low: the lower end of the interval.
        high: the upper end of the interval.
    """

    metric: str
    solver: str
    against: str
    mean: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        """The mean difference with its interval."""
        return Interval(self.mean, self.low, self.high)


class Evaluation(BaseModel):
    """What evaluation.json holds: several solvers on the same prompts and noise seeds.

    Attributes:
        split: "validation", "test", or the source of the prompts.
        prompts: the number of prompts.
        metrics: the names of the metrics.
        solvers: a row for each solver.
        differences: each learned solver minus each of the others, metric by metric.
    """

    split: str
    prompts: int
    metrics: list[str]
    solvers: list[SolverRow]
    differences: list[Difference] = []

    def solver(self, key: str) -> SolverRow | None:
        """The row of a solver, or None if it was not compared."""
        return next((row for row in self.solvers if row.key == key), None)


@dataclass(frozen=True)
class Column:
    """A column of the contact sheet, which shows one solver's pictures.

    Attributes:
        key: the solver's key.
        row: the solver's results; None before the evaluation is written.
    """

    key: str
    row: SolverRow | None

    @property
    def label(self) -> str:
        """The solver's name for people."""
        return self.row.label if self.row else self.key

    @property
    def costs(self) -> str:
        """The solver's parallel NFE and evaluations, or "" before the evaluation is written."""
        return f"parallel NFE {self.row.parallel_nfe} · {self.row.model_evals} evaluations" if self.row else ""
