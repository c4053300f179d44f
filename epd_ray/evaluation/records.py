"""What a page reads from evaluation.json: each solver's means, and the paired differences."""

from dataclasses import dataclass

from pydantic import BaseModel

from epd_ray.evaluation.statistics import Interval

SHEET_COLUMNS = 8
"""The largest number of solvers that a contact sheet shows side by side."""


class SolverRow(BaseModel):
    """One solver's line in evaluation.json."""

    key: str
    label: str
    kind: str
    intervals: int
    parallel_nfe: int
    model_evals: int
    seconds_per_image: float | None = None
    metrics: dict[str, Interval]


class Difference(BaseModel):
    """A paired difference, solver minus against, with its 95 % interval."""

    metric: str
    solver: str
    against: str
    mean: float
    low: float
    high: float


class Evaluation(BaseModel):
    """evaluation.json: every solver on the same prompts and seeds."""

    split: str
    prompts: int
    metrics: list[str]
    solvers: list[SolverRow]
    differences: list[Difference] = []

    def solver(self, key: str) -> SolverRow | None:
        return next((row for row in self.solvers if row.key == key), None)


@dataclass(frozen=True)
class Column:
    """A solver across the contact sheet; `row` is None before the evaluation is there."""

    key: str
    row: SolverRow | None

    @property
    def label(self) -> str:
        return self.row.label if self.row else self.key

    @property
    def costs(self) -> str:
        return f"parallel NFE {self.row.parallel_nfe} · {self.row.model_evals} evals" if self.row else ""
