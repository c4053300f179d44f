"""What a run's page says of its held-out curve: the kept table head by head, alarms, an early end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd_ray.evaluation.statistics import Interval
from epd_ray.evaluation.validation import STOPPED, Curve
from epd_ray.report.page import digits


@dataclass(frozen=True)
class HeadRow:
    """A head on the validation prompts: the start's mean, the kept table's, and their paired difference."""

    head: str
    watched: bool
    start: float
    kept: float
    gain: Interval

    @property
    def digits(self) -> int:
        return digits([self.gain.high - self.gain.low])


@dataclass(frozen=True)
class HeldOut:
    """What the curve says about the table that is kept, and where it raised the alarm."""

    prompts: int
    iteration: int
    heads: list[HeadRow]
    alarms: list[str]


def held_out(curve: Curve | None, rows: Sequence[Mapping[str, float]]) -> HeldOut | None:
    """What there is to say; None before the first validation.

    Args:
        curve: of the run.
        rows: its metrics, which name the best validation.
    """
    best = [int(row["iteration"]) for row in rows if row.get("validation/best")]
    if curve is None or not best:
        return None
    at = [v.iteration for v in curve.validations]
    kept = at.index(best[-1])
    start, now = ({h: float(v.mean()) for h, v in curve.validations[i].scores.items()} for i in (0, kept))
    heads = [HeadRow(h, h in curve.watched, start[h], now[h], curve.head_gain(h, kept)) for h in curve.heads]
    alarms = [alarm for i in range(len(at)) if (alarm := curve.alarm(i))]
    return HeldOut(len(curve.prompts), at[kept], heads, alarms)


def early_end(rows: Sequence[Mapping[str, float]]) -> str | None:
    """Why fine-tuning ended before its last iteration, if it did."""
    last = rows[-1] if rows else {}
    why = next((why for why in STOPPED if last.get(f"stopped/{why}")), None)
    return why and f"Fine-tuning ended early, after iteration {last['iteration']:.0f}: {STOPPED[why]}."
