"""A suite's results as one self-contained page, in the look of a run's report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epd_ray.evaluation.records import SHEET_COLUMNS, Column, Evaluation
from epd_ray.evaluation.suites.definition import FID_METRIC
from epd_ray.evaluation.suites.directory import ResultsDirectory
from epd_ray.evaluation.suites.layout import NOTHING, Cell, Table, TableRow, decimals, fid_lines, number
from epd_ray.evaluation.suites.summary import Summary, Verdict, duration
from epd_ray.report.page import data_uri, page_template
from epd_ray.storage.run_directory import write_text


@dataclass(frozen=True)
class PageRow:
    """A line of the page's table."""

    method: str
    steps: str
    schedule: str
    parallel_nfe: int
    model_evals: str
    time: str
    cells: Mapping[str, Cell]
    ours: bool


def write_page(
    results: ResultsDirectory, table: Table, summary: Summary, verdicts: Sequence[Verdict], notes: Sequence[str]
) -> None:
    """Write report.html.

    Args:
        results: with the pictures; the page goes there.
        table: of the suite.
        summary: behind it.
        verdicts: the headline.
        notes: how to read the table.

    Raises:
        RunDirectoryError: a picture that is damaged, or the disk refuses.
    """
    evaluation = Evaluation.model_validate(summary.comparison.summary())
    columns = [Column(row.key, row) for row in evaluation.solvers if (results.pictures / row.key).is_dir()]
    columns = columns[:SHEET_COLUMNS]
    is_fid = table.suite.name == "paper-fid"
    fid = fid_lines(table) if is_fid else {}
    ours = {sampler.key for sampler in table.suite.ours}
    page = page_template("suite.html.j2").render(
        name=results.path.resolve().name,
        suite=table.suite.name,
        title=_title(table, verdicts),
        sentences=[verdict.sentence for verdict in verdicts],
        facts=_facts(table, summary),
        columns=columns,
        sheet=_sheet(results, columns, summary.comparison.prompts),
        compares=table.compares,
        notes=notes,
        fid={m: {nfe: _row(row, ours) for nfe, row in rows.items()} for m, rows in fid.items()},
        nfes=sorted({nfe for rows in fid.values() for nfe in rows}),
        rows=[_row(row, ours) for row in table.rows],
        metrics=table.metrics,
        number=_number,
        distance=FID_METRIC,
        evaluation=evaluation,
        decimals={metric: decimals(metric) for metric in evaluation.metrics},
        solvers={row.key: row for row in evaluation.solvers},
        ours=ours,
        manifest=results.manifest.read_text(encoding="utf-8"),
    )
    write_text(results.report, page)


def _title(table: Table, verdicts: Sequence[Verdict]) -> str:
    suite = table.suite
    if suite.table is not None:
        return f"The paper's table {suite.table}, and what was measured here"
    best = verdicts[0]
    reference = suite.reference
    assert reference is not None
    steps = f"{reference.intervals} steps of {reference.label}"
    metric, difference = next(iter(best.differences.items()))
    gain = f"{best.sampler.label}: {metric} {_number(metric, difference.mean, True)}"
    if best.speed is None:
        return f"{gain} against {steps}"
    return f"{gain} in {best.speed.ratio:.2f} of the time of {steps}"


def _facts(table: Table, summary: Summary) -> list[tuple[str, str]]:
    prompts, seeds = summary.comparison.prompts, summary.comparison.seeds
    counts = [(f"{len(table.suite.samplers)}", "solvers")]
    if any(prompts):
        counts.append((f"{len(prompts):,}", "prompts"))
    return [*counts, (f"{len(seeds):,}", "pictures each")]


def _sheet(
    results: ResultsDirectory, columns: Sequence[Column], prompts: Sequence[str]
) -> list[tuple[str, list[str | None]]]:
    """(prompt, a picture a column), as many as were kept."""
    sheet = []
    for i, prompt in enumerate(prompts):
        pictures = [data_uri(results.pictures / column.key / f"{i:03d}.png") for column in columns]
        if not any(pictures):
            break
        sheet.append((prompt, pictures))
    return sheet


def _row(row: TableRow, ours: set[str]) -> PageRow:
    line, sampler = row.line, row.line.sampler
    return PageRow(
        method=line.method,
        steps=NOTHING if line.steps is None else str(line.steps),
        schedule=f"{line.schedule or 'its own'} schedule",
        parallel_nfe=line.parallel_nfe,
        model_evals=NOTHING if sampler is None else str(sampler.model_evals),
        time=NOTHING if row.seconds is None else duration(row.seconds),
        cells=row.cells,
        ours=sampler is not None and sampler.key in ours,
    )


def _number(metric: str, value: float, signed: bool = False) -> str:
    """With a minus sign, as the page writes numbers."""
    return number(metric, value, signed).replace("-", "\N{MINUS SIGN}")
