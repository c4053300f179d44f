"""The results of a sweep's trials, as a table."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from epd_ray.telemetry.progress import duration

Status = Literal["finished", "stopped", "failed", "unfinished"]
SHOWN = 10


@dataclass(frozen=True)
class Result:
    """The result of one trial.

    Attributes:
        trial: name of the trial and of its folder.
        status: "finished" when the trial has drawn all its images, "stopped" when the scheduler ended it, "failed" when
            it raised an error, and "unfinished" when a resumed sweep goes on with it.
        values: key that is swept -> the trial's value.
        images: number of training images.
        seconds: duration of the trial without its set-up.
        start: held-out reward of the table of stage 1, None before the first evaluation.
        reward: held-out reward of the trial's best table, None before the first evaluation.
        low: lower end of the 95 % interval of `reward`.
        high: upper end of the 95 % interval of `reward`.
        error: the error in one line, empty where the trial did not fail.
    """

    trial: str
    status: Status
    values: Mapping[str, JsonValue]
    images: int = 0
    seconds: float = 0.0
    start: float | None = None
    reward: float | None = None
    low: float | None = None
    high: float | None = None
    error: str = ""

    @property
    def ranked(self) -> bool:
        """Whether the trial's solver may be the best one."""
        return self.reward is not None and self.status != "failed"


def ranking(results: Sequence[Result]) -> list[Result]:
    """Results in order, the best held-out reward first, and trials without one and failed trials last."""

    def rank(result: Result) -> tuple[bool, float, str]:
        return not result.ranked, 0.0 if result.reward is None else -result.reward, result.trial

    return sorted(results, key=rank)


def as_csv(results: Sequence[Result]) -> str:
    """Text of a CSV file with a row for each trial and a column for each swept key."""
    numbers = ("images", "seconds", "start", "reward", "low", "high")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "status", *results[0].values, *numbers, "error"])
    for result in results:
        found = vars(result)
        row = ["" if found[name] is None else found[name] for name in numbers]
        writer.writerow([result.trial, result.status, *result.values.values(), *row, result.error])
    return text.getvalue()


def as_lines(results: Sequence[Result]) -> list[str]:
    """The first SHOWN results as lines for a terminal."""
    lines = [_line(result) for result in results[:SHOWN]]
    return [*lines, f"... and {len(results) - SHOWN} more"] if len(results) > SHOWN else lines


def _line(result: Result) -> str:
    values = "  ".join(f"{key}={_short(value)}" for key, value in result.values.items())
    if result.reward is None or result.low is None or result.high is None or result.start is None:
        return f"{result.trial}  {result.status:<10}  {values}  {result.error}".rstrip()
    reward = f"held-out {result.reward:.4f} [{result.low:.4f}, {result.high:.4f}] from {result.start:.4f}"
    cost = f"{result.images} images, {duration(result.seconds)}"
    return f"{result.trial}  {result.status:<10}  {reward}  {cost}  {values}  {result.error}".rstrip()


def _short(value: JsonValue) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
