"""How figures are written for people: means and differences with their intervals, times, and tables of text."""

import re
import textwrap
from collections.abc import Sequence

from epd_ray.evaluation.records import SCENE_ACCURACY, Evaluation
from epd_ray.evaluation.statistics import Interval
from epd_ray.report.page import digits
from epd_ray.telemetry import progress

NOTHING = "-"
WIDTH = 100  # characters of a line on the terminal
LABEL = 24  # characters of a solver's name in a line of a table


def named(metric: str) -> str:
    """A metric's name for people."""
    return metric.replace("_", " ")


def decimals(evaluation: Evaluation, metric: str) -> int:
    """The number of decimals that suits the uncertainty of the differences in a metric."""
    return digits([d.high - d.low for d in evaluation.differences if d.metric == metric])


def mean(metric: str, value: Interval | None, places: int) -> str:
    """Write a mean with its interval, such as "0.940 [0.925, 0.953]"; scene accuracy is a percentage."""
    if value is None:
        return NOTHING
    if metric == SCENE_ACCURACY:
        return f"{100 * value.mean:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{value.mean:.{places}f} [{value.low:.{places}f}, {value.high:.{places}f}]"


def difference(metric: str, value: Interval, places: int) -> str:
    """Write a difference with its sign and interval; that of scene accuracy is in percentage points."""
    if metric == SCENE_ACCURACY:
        return f"{100 * value.mean:+.1f} points [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    return f"{value.mean:+.{places}f} [{value.low:+.{places}f}, {value.high:+.{places}f}]"


def duration(seconds: float | None) -> str:
    """Write the time of a picture as "12.3 ms", "1.23 s" or "16 min 40 s"."""
    if seconds is None:
        return NOTHING
    if seconds >= 999.5:
        return progress.duration(seconds)
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def listed(parts: Sequence[str]) -> str:
    """Join words as "a", "a and b" or "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows for a terminal, with the columns aligned: words to the left and numbers to the right.

    Args:
        rows: the header first. A cell may have several lines; those of the header stand at the bottom of their row.
    """
    header, *body = [[cell.split("\n") for cell in row] for row in rows]
    lines = _spread(header, at_bottom=True) + [line for row in body for line in _spread(row)]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(columns))]
    return ["  ".join(map(_justified, line, widths, right)).rstrip() for line in lines]


def _spread(cells: Sequence[Sequence[str]], at_bottom: bool = False) -> list[tuple[str, ...]]:
    height = max(map(len, cells))
    blank = [[""] * (height - len(cell)) for cell in cells]
    return list(zip(*([*b, *c] if at_bottom else [*c, *b] for b, c in zip(blank, cells, strict=True)), strict=True))


def _is_number(cell: str) -> bool:
    return cell in ("", NOTHING) or cell.lstrip("+-")[:1].isdigit()


def _justified(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def wrapped(text: str, width: int) -> str:
    """Break a text into lines of at most `width` characters between its words, but not within brackets."""
    whole = re.sub(r"\[[^]]*]", lambda interval: interval[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")
