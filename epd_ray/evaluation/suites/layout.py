"""Results as tables: the papers' own layout with their values beside ours, or one line a sampler."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd_ray.drawing.sampler import Sampler
from epd_ray.evaluation.comparison import SCENE_ACCURACY
from epd_ray.evaluation.statistics import Interval
from epd_ray.evaluation.suites.definition import FID_METRIC, Line, Suite
from epd_ray.evaluation.suites.measure import SHARPNESS
from epd_ray.evaluation.suites.paper import TITLES
from epd_ray.evaluation.suites.settings import FID_PICTURES
from epd_ray.evaluation.suites.summary import Summary

DECIMALS = {FID_METRIC: 2, SHARPNESS: 1, SCENE_ACCURACY: 3}
NOTHING = "-"


@dataclass(frozen=True)
class Cell:
    """A metric of a line: what was measured here, and what the paper says."""

    ours: Interval | None
    published: float | None = None
    comparable: bool = True  # whether both measure the same

    @property
    def difference(self) -> Interval | None:
        """Ours minus the paper's, with the interval of ours: the paper gives none."""
        if self.ours is None or self.published is None or not self.comparable:
            return None
        return Interval(*(end - self.published for end in (self.ours.mean, self.ours.low, self.ours.high)))


@dataclass(frozen=True)
class TableRow:
    """A line of a table."""

    line: Line
    seconds: float | None
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """A suite's results, line by line.

    Attributes:
        suite: of which.
        metrics: column -> its title.
        rows: in the order of the suite's lines.
        means: sampler's key -> metric -> mean with interval. The Frechet distance has a mean alone: it is larger of
            fewer different pictures, which those of a bootstrap are, so that its interval would lie beside it.
        is_fid: whether the Frechet distance is of Inception's features.
        pictures: of each sampler.
    """

    suite: Suite
    metrics: Mapping[str, str]
    rows: tuple[TableRow, ...]
    means: Mapping[str, Mapping[str, Interval]]
    is_fid: bool
    pictures: int

    @property
    def compares(self) -> bool:
        """Whether there are values of a paper."""
        return any(row.line.published for row in self.rows)


def tabulate(suite: Suite, summary: Summary, heads: Mapping[str, str], is_fid: bool = True) -> Table:
    """Join what was measured with what is published.

    Args:
        suite: that was measured.
        summary: of it.
        heads: metric -> head's registry name, which the paper's columns go by; one head of each.
        is_fid: whether the Frechet distance is of Inception's features.
    """
    means = dict(summary.comparison.means)
    for key, distance in summary.distances.items():
        means[key] = {FID_METRIC: Interval(distance, math.nan, math.nan), **means[key]}
    seconds = {row.sampler.key: row.seconds_per_image for row in summary.comparison.rows}
    column_of = {head: metric for metric, head in reversed(list(heads.items()))}
    published = [{column_of.get(name, name): v for name, v in line.published.items()} for line in suite.lines]
    columns: list[Mapping[str, object]] = [*published, *means.values()]
    there = dict.fromkeys(metric for column in columns for metric in column)
    titles = {metric: TITLES[head] for head, metric in column_of.items() if head in TITLES}
    titles[FID_METRIC] = "FID" if is_fid else "Frechet distance"
    metrics = {m: titles.get(m, TITLES.get(m, m.replace("_", " "))) for m in there}
    drawn = len(summary.comparison.seeds)
    as_published = is_fid and drawn >= FID_PICTURES
    rows = []
    for line, values in zip(suite.lines, published, strict=True):
        key = line.sampler.key if line.sampler else ""
        cells = {m: Cell(means.get(key, {}).get(m), values.get(m), as_published or m != FID_METRIC) for m in metrics}
        rows.append(TableRow(line, seconds.get(key), cells))
    return Table(suite, metrics, tuple(rows), means, is_fid, drawn)


# -- text -------------------------------------------------------------------------------------------------------------


def grid(table: Table) -> list[list[str]]:
    """The table as text, the header first: a row of ours a line and, where a paper is compared, two more below it."""
    if table.suite.name == "paper-fid":
        return _fid_grid(table)
    first = ["method", "steps", "schedule", "NFE", "evaluations", "s/image"]
    found = [[*first, *table.metrics.values()]]
    for row in table.rows:
        line = row.line
        costs = [str(line.steps), line.schedule or "its own", *_costs(line.sampler, line.parallel_nfe)]
        time = NOTHING if row.seconds is None else f"{row.seconds:.3g}"
        found.append([line.method, *costs, time, *(_text(m, cell.ours) for m, cell in row.cells.items())])
        if line.published:
            blank = [""] * (len(first) - 1)
            found.append(["  paper", *blank, *(_published(m, cell) for m, cell in row.cells.items())])
            found.append(["  ours minus paper", *blank, *(_text(m, c.difference, True) for m, c in row.cells.items())])
    return found


def _costs(sampler: Sampler | None, parallel_nfe: int) -> list[str]:
    return [str(parallel_nfe), NOTHING if sampler is None else str(sampler.model_evals)]


def fid_lines(table: Table) -> dict[str, dict[int, TableRow]]:
    """Method -> parallel NFE -> its cell of the FID table."""
    found: dict[str, dict[int, TableRow]] = {}
    for row in table.rows:
        found.setdefault(row.line.method, {})[row.line.parallel_nfe] = row
    return found


def _fid_grid(table: Table) -> list[list[str]]:
    lines = fid_lines(table)
    nfes = sorted({nfe for cells in lines.values() for nfe in cells})
    found = [["method", *(f"NFE {nfe}" for nfe in nfes)]]
    for method, rows in lines.items():
        cells = [rows[nfe].cells[FID_METRIC] for nfe in nfes]
        found.append([method, *(_text(FID_METRIC, cell.ours) for cell in cells)])
        evals = [_costs(rows[nfe].line.sampler, nfe)[1] for nfe in nfes]
        found.append(["  evaluations", *evals])
        found.append(["  paper", *(_published(FID_METRIC, cell) for cell in cells)])
        found.append(["  ours minus paper", *(_text(FID_METRIC, cell.difference, True) for cell in cells)])
    return found


def decimals(metric: str) -> int:
    """That the metric is worth."""
    return DECIMALS.get(metric, 4)


def number(metric: str, value: float, signed: bool = False) -> str:
    """With as many decimals as the metric is worth."""
    digits = decimals(metric)
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _text(metric: str, value: Interval | None, signed: bool = False) -> str:
    if value is None:
        return NOTHING
    if not value.known or value.low == value.high:
        return number(metric, value.mean, signed)
    return f"{number(metric, value.mean, signed)} [{number(metric, value.low, signed)}, " \
           f"{number(metric, value.high, signed)}]"  # fmt: skip


def _published(metric: str, cell: Cell) -> str:
    return NOTHING if cell.published is None else number(metric, cell.published)


def plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """For a terminal: columns under each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    header, *body = [[cell.strip().replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]


def differences(summary: Summary) -> list[list[str]]:
    """Ours minus each other sampler, the header first; prompt by prompt, with intervals."""
    labels = {
        row.sampler.key: f"{row.sampler.label} (NFE {row.sampler.parallel_nfe})" for row in summary.comparison.rows
    }
    found: dict[tuple[str, str], dict[str, str]] = {}
    for d in summary.comparison.differences:
        found.setdefault((d.solver, d.against), {})[d.metric] = _text(d.metric, d.interval, True)
    metrics = list(summary.comparison.rows[0].values)
    rows = [[f"{labels[a]} minus {labels[b]}", *(by.get(m, NOTHING) for m in metrics)] for (a, b), by in found.items()]
    return [["paired difference", *(m.replace("_", " ") for m in metrics)], *rows]


def as_csv(table: Table) -> str:
    """One row a line of the suite and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "sampler", "steps", "schedule", "parallel_nfe", "model_evals", "seconds_per_image", "metric", "mean",
         "low", "high", "published", "difference", "difference_low", "difference_high"]
    )  # fmt: skip
    for row in table.rows:
        line, sampler = row.line, row.line.sampler
        key, evals = (None, None) if sampler is None else (sampler.key, sampler.model_evals)
        about = [line.method, key, line.steps, line.schedule, line.parallel_nfe, evals, row.seconds]
        for metric, cell in row.cells.items():
            if cell.ours is None and cell.published is None:
                continue
            writer.writerow([*about, metric, *_ends(cell.ours), cell.published, *_ends(cell.difference)])
    return out.getvalue()


def _ends(value: Interval | None) -> tuple[float | None, float | None, float | None]:
    if value is None:
        return (None, None, None)
    return (value.mean, value.low, value.high) if value.known else (value.mean, None, None)
