"""The form of evaluation.json: each solver's costs and means, and the paired differences between solvers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.statistics import Interval
from epd_ray.solvers.rival import Rival, told
from epd_ray.solvers.schedule_names import OWN
from epd_ray.storage.documents import parse_record
from epd_ray.telemetry.progress import counted

SHEET_COLUMNS = 8
"""The largest number of solvers that a contact sheet shows side by side."""
SCENE_ACCURACY, SHARPNESS, DIVERSITY = "scene_accuracy", "sharpness", "diversity"
NEUTRAL = (SHARPNESS, DIVERSITY)
"""The metrics of which more is not better."""
OURS = "rdpo"
"""The key of a run's solver."""


class Tuned(BaseModel):
    """How a rival came to its settings.

    Attributes:
        chosen: the text form of the rival that was chosen, see `epd_ray.solvers.rival.Rival`.
        images: the number of pictures that were drawn for the choice.
        candidates: the number of settings that were tried.
    """

    chosen: str
    images: int
    candidates: int

    @property
    def settings(self) -> str:
        """What was chosen for people, such as "guidance scale 2, shift 3"; empty if the rival stays as it comes."""
        rival = Rival.parse(self.chosen)
        schedule = [] if rival.schedule == OWN else [f"schedule {rival.schedule}"]
        return ", ".join([*schedule, *(told(name, value) for name, value in rival.chosen.items())])


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
        network_passes: the number of all passes of the network, two an evaluation with classifier-free guidance; None
            if it is not known.
        seconds_per_image: the time of a picture in seconds; None if it was not measured.
        metrics: the mean of each metric over the prompts, with its 95 % interval.
        sigmas: the noise levels between the intervals, [N+1], decreasing; empty if they are not known.
        guidance_scale: the guidance scale of the solver's pictures; None if it is not known.
        tuned: how the solver came to its settings; None for one that was not tuned.
    """

    key: str
    label: str
    kind: str
    schedule: str | None = None
    intervals: int
    parallel_nfe: int
    model_evals: int
    network_passes: int | None = None
    seconds_per_image: float | None = None
    metrics: dict[str, Interval]
    sigmas: list[float] = []
    guidance_scale: float | None = None
    tuned: Tuned | None = None

    @property
    def numbers(self) -> tuple[int, int, int | None]:
        """Parallel NFE, evaluations and network passes, as every table shows them side by side."""
        return self.parallel_nfe, self.model_evals, self.network_passes

    @property
    def costs(self) -> list[str]:
        """All costs for people: "parallel NFE 4", "6 evaluations" and, if they are known, "12 network passes"."""
        passes = [] if self.network_passes is None else [counted(self.network_passes, "network pass")]
        return [f"parallel NFE {self.parallel_nfe}", counted(self.model_evals, "evaluation"), *passes]


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
        guidance_scale: the guidance scale of the pictures of every solver that has no other; None if it is not known.
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
    def equal_cost(self) -> Literal["network_passes", "model_evals"]:
        """The cost at which solvers are compared: network passes, or evaluations if the file lacks the passes."""
        known = all(row.network_passes is not None for row in self.solvers)
        return "network_passes" if known else "model_evals"

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
        """What the solver's pictures cost, or "" before the evaluation is written."""
        return " · ".join(self.row.costs) if self.row else ""


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
