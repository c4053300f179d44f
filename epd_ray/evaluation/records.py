"""The form of evaluation.json: each solver's costs and means, and the paired differences between solvers."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.statistics import Interval
from epd_ray.storage.documents import parse_record
from epd_ray.telemetry.progress import counted

SHEET_COLUMNS = 8
"""The largest number of solvers that a contact sheet shows side by side."""
SCENE_ACCURACY, SHARPNESS, DIVERSITY = "scene_accuracy", "sharpness", "diversity"
NEUTRAL = (SHARPNESS, DIVERSITY)
"""The metrics of which more is not better."""
OURS = "rdpo"
"""The key of a run's solver."""


class SolverRow(BaseModel):
    """One solver's costs and mean scores.

    Attributes:
        key: the solver's name in files and folders.
        label: the solver's name for people.
        kind: "epd", or the name of a method in epd_ray.solvers.zoo.
        schedule: "own" for the method's own sigmas, "model" for the model's, or the name of a sigma schedule.
        intervals: the number of intervals.
        parallel_nfe: the length of the longest chain of evaluations that wait for each other.
        model_evals: the number of all evaluations.
        seconds_per_image: the time of a picture in seconds; None if it was not measured.
        metrics: the mean of each metric over the prompts, with its 95 % interval.
        sigmas: the noise levels between the intervals, [N+1], decreasing; empty if they are not known.
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
    sigmas: list[float] = []


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
        differences: each of `ours` minus each of the other solvers, metric by metric.
        ours: the keys of the learned solvers that the evaluation is about.
        reference: the key of the slow solver that shows what many steps give; None if there is none.
        guidance_scale: the guidance scale of all pictures; None if it is not known.
    """

    split: str
    prompts: int
    metrics: list[str]
    solvers: list[SolverRow]
    differences: list[Difference] = []
    ours: list[str] = [OURS]
    reference: str | None = None
    guidance_scale: float | None = None

    @property
    def scores(self) -> list[str]:
        """The metrics of which more is better."""
        return [metric for metric in self.metrics if metric not in NEUTRAL]

    def solver(self, key: str) -> SolverRow | None:
        """The row of a solver, or None if it was not compared."""
        return next((row for row in self.solvers if row.key == key), None)

    def differences_of(self, solver: str, against: str) -> dict[str, Interval]:
        """The differences of one solver from another by metric; empty if they were not taken."""
        return {d.metric: d.interval for d in self.differences if (d.solver, d.against) == (solver, against)}


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
        if self.row is None:
            return ""
        return f"parallel NFE {self.row.parallel_nfe} · {counted(self.row.model_evals, 'evaluation')}"


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.json.

    Raises:
        RunDirectoryError: it is missing or damaged.
    """
    fix = "evaluate the run again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror or error} ({fix})") from error
    return parse_record(Evaluation, data, path, RunDirectoryError, fix, finite=False)  # an unknown interval is NaN
