"""A suite's results as tables: in the layout of a paper's table with its values beside ours, or a line a sampler."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd_ray.evaluation.records import SCENE_ACCURACY, SHARPNESS
from epd_ray.evaluation.statistics import Interval
from epd_ray.evaluation.suites.definition import FID_METRIC, Line, Suite
from epd_ray.evaluation.suites.measure import Summary
from epd_ray.evaluation.suites.paper import TITLES
from epd_ray.evaluation.suites.settings import FID_PICTURES
from epd_ray.evaluation.wording import NOTHING

DECIMALS = {FID_METRIC: 2, SHARPNESS: 1, SCENE_ACCURACY: 3}


@dataclass(frozen=True)
class Cell:
    """The value of a metric in a line of the table.

    Attributes:
        ours: what was measured here; None if nothing was.
        published: the paper's value; None if it has none.
        comparable: whether both values measure the same, so that their difference means something.
    """

    ours: Interval | None
    published: float | None = None
    comparable: bool = True

    @property
    def difference(self) -> Interval | None:
        """Our value minus the paper's, with the interval of ours, because the paper gives none."""
        if self.ours is None or self.published is None or not self.comparable:
            return None
        return Interval(*(end - self.published for end in (self.ours.mean, self.ours.low, self.ours.high)))


@dataclass(frozen=True)
class TableRow:
    """A line of a table with its values.

    Attributes:
        line: which sampler, and what the paper says of it.
        network_passes: the passes of the network for a picture; None if nothing was drawn, or if they are not known.
        seconds: the time of a picture in seconds; None if nothing was drawn.
        cells: metric -> its value.
    """

    line: Line
    network_passes: int | None
    seconds: float | None
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """A suite's results, line by line.

    Attributes:
        suite: the suite.
        metrics: metric -> the title of its column.
        rows: the lines in the order of the suite.
        means: sampler's key -> metric -> mean with its interval. The Frechet distance has no interval: a bootstrap
            sample has fewer distinct pictures, for which the distance is larger, so that the interval would not
            contain the value.
        is_fid: whether the Frechet distance is of Inception's features, which makes it the FID.
        pictures: the number of pictures of each sampler.
    """

    suite: Suite
    metrics: Mapping[str, str]
    rows: tuple[TableRow, ...]
    means: Mapping[str, Mapping[str, Interval]]
    is_fid: bool
    pictures: int

    @property
    def compares(self) -> bool:
        """Whether the table has values of a paper."""
        return any(row.line.published for row in self.rows)


def tabulate(suite: Suite, summary: Summary, heads: Mapping[str, str], is_fid: bool = True) -> Table:
    """Join what was measured with what is published.

    Args:
        suite: the suite that was measured.
        summary: its figures.
        heads: metric -> registry name of its reward head, by which the paper's columns are found. If several metrics
            have the same head, the first stands beside the paper's value.
        is_fid: whether the Frechet distance is of Inception's features.
    """
    means = dict(summary.comparison.means)
    for key, distance in summary.distances.items():
        means[key] = {FID_METRIC: Interval(distance, math.nan, math.nan), **means[key]}
    passes = {row.key: row.network_passes for row in summary.comparison.evaluation.solvers}
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
        rows.append(TableRow(line, passes.get(key), seconds.get(key), cells))
    return Table(suite, metrics, tuple(rows), means, is_fid, drawn)


# -- text -------------------------------------------------------------------------------------------------------------


def grid(table: Table) -> list[list[str]]:
    """The table as rows of text: the header, then for each line our values, the paper's, and the difference."""
    if table.suite.name == "paper-fid":
        return _fid_grid(table)
    first = ["method", "steps", "schedule", "parallel NFE", "evaluations", "network passes", "s/image"]
    found = [[*first, *table.metrics.values()]]
    for row in table.rows:
        line = row.line
        costs = [str(line.steps), line.schedule or "its own", *_costs(row)]
        time = NOTHING if row.seconds is None else f"{row.seconds:.3g}"
        found.append([line.method, *costs, time, *(spelled(m, cell.ours) for m, cell in row.cells.items())])
        if line.published:
            blank = [""] * (len(first) - 1)
            found.append(["  paper", *blank, *(_published(m, cell) for m, cell in row.cells.items())])
            found.append(
                ["  ours minus paper", *blank, *(spelled(m, c.difference, True) for m, c in row.cells.items())]
            )
    return found


def _costs(row: TableRow) -> list[str]:
    """Parallel NFE, evaluations and network passes, as text."""
    evals = None if row.line.sampler is None else row.line.sampler.model_evals
    return [written(cost) for cost in (row.line.parallel_nfe, evals, row.network_passes)]


def written(cost: int | None) -> str:
    """A cost as text, and a dash for one that is not known."""
    return NOTHING if cost is None else str(cost)


def fid_lines(table: Table) -> dict[str, dict[int, TableRow]]:
    """The cells of the FID table by method and parallel NFE."""
    found: dict[str, dict[int, TableRow]] = {}
    for row in table.rows:
        found.setdefault(row.line.method, {})[row.line.parallel_nfe] = row
    return found


def _fid_grid(table: Table) -> list[list[str]]:
    lines = fid_lines(table)
    nfes = sorted({nfe for cells in lines.values() for nfe in cells})
    found = [["method", *(f"parallel NFE {nfe}" for nfe in nfes)]]
    for method, rows in lines.items():
        cells = [rows[nfe].cells[FID_METRIC] for nfe in nfes]
        found.append([method, *(spelled(FID_METRIC, cell.ours) for cell in cells)])
        _, evals, passes = zip(*(_costs(rows[nfe]) for nfe in nfes), strict=True)
        found += [["  evaluations", *evals], ["  network passes", *passes]]
        found.append(["  paper", *(_published(FID_METRIC, cell) for cell in cells)])
        found.append(["  ours minus paper", *(spelled(FID_METRIC, cell.difference, True) for cell in cells)])
    return found


def decimals(metric: str) -> int:
    """The number of decimals that a metric is shown with."""
    return DECIMALS.get(metric, 4)


def number(metric: str, value: float, signed: bool = False) -> str:
    """Write a value with the decimals of its metric and, if `signed`, with its sign."""
    digits = decimals(metric)
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def spelled(metric: str, value: Interval | None, signed: bool = False) -> str:
    """Write a mean or a difference with its interval, if that is known and has a width."""
    if value is None:
        return NOTHING
    if not value.known or value.low == value.high:
        return number(metric, value.mean, signed)
    return f"{number(metric, value.mean, signed)} [{number(metric, value.low, signed)}, " \
           f"{number(metric, value.high, signed)}]"  # fmt: skip


def _published(metric: str, cell: Cell) -> str:
    return NOTHING if cell.published is None else number(metric, cell.published)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows as a Markdown table; the first row is the header."""
    header, *body = [[cell.strip().replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]


def differences(summary: Summary) -> list[list[str]]:
    """The paired differences with their intervals as rows of text, with the header first."""
    labels = {
        row.sampler.key: f"{row.sampler.label} (parallel NFE {row.sampler.parallel_nfe})"
        for row in summary.comparison.rows
    }
    found: dict[tuple[str, str], dict[str, str]] = {}
    for d in summary.comparison.differences:
        found.setdefault((d.solver, d.against), {})[d.metric] = spelled(d.metric, d.interval, True)
    metrics = list(summary.comparison.rows[0].values)
    rows = [[f"{labels[a]} minus {labels[b]}", *(by.get(m, NOTHING) for m in metrics)] for (a, b), by in found.items()]
    return [["paired difference", *(m.replace("_", " ") for m in metrics)], *rows]


def as_csv(table: Table) -> str:
    """Write the table as CSV, with one row for each line of the suite and each metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "sampler", "steps", "schedule", "parallel_nfe", "model_evals", "network_passes", "seconds_per_image",
         "metric", "mean", "low", "high", "published", "difference", "difference_low", "difference_high"]
    )  # fmt: skip
    for row in table.rows:
        line, sampler = row.line, row.line.sampler
        key, evals = (None, None) if sampler is None else (sampler.key, sampler.model_evals)
        about = [line.method, key, line.steps, line.schedule, line.parallel_nfe, evals, row.network_passes, row.seconds]
        for metric, cell in row.cells.items():
            if cell.ours is None and cell.published is None:
                continue
            writer.writerow([*about, metric, *_ends(cell.ours), cell.published, *_ends(cell.difference)])
    return out.getvalue()


def _ends(value: Interval | None) -> tuple[float | None, float | None, float | None]:
    if value is None:
        return (None, None, None)
    return (value.mean, value.low, value.high) if value.known else (value.mean, None, None)
