"""What came of a sweep's trials, as rows."""

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
    """A trial's outcome.

    Attributes:
        trial: its name, which is that of its folder.
        status: finished its budget; stopped by the scheduler; failed; unfinished: a resumed sweep goes on with it.
        values: of the keys that are swept.
        images: drawn for training.
        seconds: that it took, set-up aside.
        start: held-out reward of the table of stage 1; None before the first evaluation.
        reward: held-out reward of its best table; None before the first evaluation.
        low: lower end of the reward's 95 % interval.
        high: upper end.
        error: what it failed with, in a line.
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
        """Whether its solver may be the best one."""
        return self.reward is not None and self.status != "failed"


def ranking(results: Sequence[Result]) -> list[Result]:
    """The best held-out reward first; those without one, and those that failed, last."""

    def rank(result: Result) -> tuple[bool, float, str]:
        return not result.ranked, 0.0 if result.reward is None else -result.reward, result.trial

    return sorted(results, key=rank)


def as_csv(results: Sequence[Result]) -> str:
    """One row per trial, with a column per key that is swept."""
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
    """The first few, for a terminal."""
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
