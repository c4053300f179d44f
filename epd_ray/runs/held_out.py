"""What the report of a run says about the validations: the kept table per head, alarms and an early end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd_ray.evaluation.statistics import Interval, judged
from epd_ray.evaluation.validation import STOPPED, Curve
from epd_ray.report.page import digits


@dataclass(frozen=True)
class HeadRow:
    """The scores of a head on the validation prompts.

    Attributes:
        head: the name of the head.
        watched: whether the head is only watched and not trained on.
        start: the mean score of the start table.
        kept: the mean score of the kept table.
        gain: the mean of the paired differences, kept minus start, with its interval.
    """

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
    """The kept table on the validation prompts, and the alarms of the run.

    Attributes:
        prompts: the number of validation prompts.
        iteration: the iteration of the kept table.
        heads: one row per head.
        alarms: one sentence per alarm.
    """

    prompts: int
    iteration: int
    heads: list[HeadRow]
    alarms: list[str]


def held_out(curve: Curve | None, rows: Sequence[Mapping[str, float]]) -> HeldOut | None:
    """Summarise the validations of a run; None before the first one.

    Args:
        curve: the scores of all validations; None where the run has none yet.
        rows: the metrics of the run, in which validation/best marks the kept table.
    """
    best = [int(row["iteration"]) for row in rows if row.get("validation/best")]
    if curve is None or not best:
        return None
    at = [v.iteration for v in curve.validations]
    kept = at.index(best[-1])
    start, now = ({h: float(judged(v).mean()) for h, v in curve.validations[i].scores.items()} for i in (0, kept))
    heads = [HeadRow(h, h in curve.watched, start[h], now[h], curve.head_gain(h, kept)) for h in curve.heads]
    alarms = [alarm for i in range(len(at)) if (alarm := curve.alarm(i))]
    return HeldOut(len(curve.prompts), at[kept], heads, alarms)


def early_end(rows: Sequence[Mapping[str, float]]) -> str | None:
    """A sentence about why fine-tuning ended before its last iteration; None if it did not."""
    last = rows[-1] if rows else {}
    why = next((why for why in STOPPED if last.get(f"stopped/{why}")), None)
    return why and f"Fine-tuning ended early, after iteration {last['iteration']:.0f}: {STOPPED[why]}."
