"""The results of a suite: the files in its directory, the lines on the terminal, and the page report.html."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib import rc_context

from epd_ray.evaluation.drawings import cost_curves
from epd_ray.evaluation.records import SHEET_COLUMNS, Column
from epd_ray.evaluation.suites.definition import FID_METRIC, Suite
from epd_ray.evaluation.suites.directory import ResultsDirectory
from epd_ray.evaluation.suites.measure import FEATURES, Features, Summary, summarise, timing
from epd_ray.evaluation.suites.seeds import OverSeeds, Runs, over_seeds, seeds_grid
from epd_ray.evaluation.suites.settings import FID_PICTURES
from epd_ray.evaluation.suites.subject import Pictures, Subject
from epd_ray.evaluation.suites.tables import (
    Cell,
    Table,
    TableRow,
    as_csv,
    decimals,
    differences,
    fid_lines,
    grid,
    markdown,
    number,
    tabulate,
    written,
)
from epd_ray.evaluation.verdict import Verdict, ordered, tuned_settings, verdicts
from epd_ray.evaluation.wording import NOTHING, WIDTH, duration, plain, wrapped
from epd_ray.report.figures import STYLE
from epd_ray.report.page import data_uri, page_template
from epd_ray.storage.run_directory import package_versions, whole, write_text

SOURCES = {
    "paper": "The paper's values are from arXiv 2512.22796 (table {table}) and were measured on COCO captions; another "
    "model or other prompts here would explain a part of the differences. The intervals show the uncertainty of our "
    "values only.",
    "paper-fid": "The paper's values are from arXiv 2507.14797 (table 1, {table}) and were measured on 50,000 pictures "
    "for each cell with the models of EDM and Consistency Models; another model here would explain a part of the "
    "differences.",
}
"""Suite -> where the paper's values come from, and what to keep in mind when comparing."""
TIMES = "A time is the median over batches, which the solvers drew in turns."
INTERVALS = {
    False: "Intervals are over the prompts alone: each solver comes from one run, and a run with another seed differs "
    "further.",
    True: "Where several seeds of one run are summed up, intervals are over seeds and prompts together; all others are "
    "over the prompts alone.",
}
"""Whether several seeds are summed up -> what the intervals are over."""
PROMPTS = "prompts.json"  # the file in which `epd-ray ab make` looks for the prompts of two folders of pictures


def write_results(results: ResultsDirectory, subject: Subject, features: Features, runs: Runs = ()) -> list[str]:
    """Write results.parquet, results.csv, results.md, results.json and report.html from the finished shards.

    Args:
        results: the directory, which has all shards of all samplers.
        subject: what was measured.
        features: the features of the reference set, if there is one.
        runs: which of the learned solvers differ in nothing but the seed of their run.

    Returns:
        The verdicts, the table and the place of the page, as lines for the terminal.

    Raises:
        RunDirectoryError: a shard is damaged, or the disk refuses.
    """
    suite = subject.suite
    facts = subject.facts
    summary = summarise(
        suite, subject.pictures, results, features.reference, facts.guidance_scale, facts.classifier_free
    )
    heads = {name: head.head for name, head in subject.config.rewards.items()}
    table = tabulate(suite, summary, heads, features.is_fid)
    found = verdicts(summary.comparison.evaluation, timing(summary.times))
    settings = tuned_settings(summary.comparison.evaluation)
    prompted = suite.name != "paper-fid"
    seeds = over_seeds(runs, summary.comparison) if prompted else []
    about = [*([settings] if settings else []), *([INTERVALS[bool(seeds)]] if prompted else [])]
    said = [subject.sentence, TIMES, *about, *notes(table)]
    _write_rows(results, suite, subject.pictures)
    if results.pictures.is_dir():
        write_text(results.pictures / PROMPTS, json.dumps(subject.pictures.prompts, indent=2))
    write_text(results.path / "results.csv", as_csv(table))
    write_text(results.path / "results.md", "\n".join(_markdown(table, summary, found, said, seeds)) + "\n")
    record = json.dumps(_record(summary, found, seeds), indent=2, ensure_ascii=False)
    write_text(results.path / "results.json", record + "\n")
    write_page(results, table, summary, found, said, seeds)
    first = [line for verdict in found for line in (*wrapped(verdict.sentence, WIDTH).split("\n"), "")]
    together = [*plain(seeds_grid(seeds, summary.comparison)), ""] if seeds else []
    return [*first, *plain(grid(table)), "", *together, *said, f"report: {results.report}"]


def _write_rows(results: ResultsDirectory, suite: Suite, pictures: Pictures) -> None:
    """Write results.parquet, with a row for every picture, holding the rows of one sampler in memory at a time."""
    names = [name for name in results.columns(suite.samplers[0].key) if name != FEATURES]
    with whole(results.path / "results.parquet") as partial:
        writer: pq.ParquetWriter | None = None
        try:
            for sampler in suite.samplers:
                rows = results.read(sampler.key, pictures.shards, names)
                rows = rows.add_column(0, "sampler", pa.array([sampler.key] * len(rows)))
                writer = writer or pq.ParquetWriter(partial, rows.schema, compression="zstd")
                writer.write_table(rows)
        finally:
            if writer is not None:
                writer.close()


def notes(table: Table) -> list[str]:
    """Sentences that a reader of the table has to know."""
    suite = table.suite
    found = [] if suite.table is None else [SOURCES[suite.name].format(table=suite.table)]
    if FID_METRIC in table.metrics and not table.is_fid:
        found.append(
            "The Frechet distance here is not an FID, because its features are not Inception's: compare it only with "
            "other lines of this table."
        )
    elif suite.name == "paper-fid" and table.pictures < FID_PICTURES:
        found.append(
            f"No difference to the paper's FID is shown, because {table.pictures:,} pictures were drawn here: the FID "
            "of fewer pictures is larger."
        )
    silent = [title for metric, title in table.metrics.items() if all(r.cells[metric].ours is None for r in table.rows)]
    if silent:
        found.append(
            f"No reward head of the configuration computes {', '.join(silent)}: name one under rewards to fill the "
            "column."
        )
    absent = [row.line.method for row in table.rows if row.line.sampler is None]
    if absent:
        names = ", ".join(dict.fromkeys(absent))
        found.append(f"Only the paper's values are shown of methods that nothing here draws at that cost: {names}.")
    return found


def _markdown(
    table: Table, summary: Summary, found: Sequence[Verdict], said: Sequence[str], seeds: Sequence[OverSeeds]
) -> list[str]:
    lines = [f"# Suite {table.suite.name}", "", *(line for v in found for line in (f"**{v.sentence}**", ""))]
    lines += [" ".join(said), "", *markdown(grid(table)), ""]
    if seeds:
        lines += [*markdown(seeds_grid(seeds, summary.comparison)), ""]
    if summary.comparison.differences:
        lines += ["Paired differences, prompt by prompt, with their 95 % intervals:", "",
                  *markdown(differences(summary))]  # fmt: skip
    return lines


def _record(summary: Summary, found: Sequence[Verdict], seeds: Sequence[OverSeeds]) -> dict[str, object]:
    said = [
        {
            "solver": v.ours.key,
            "sentence": v.sentence,
            "against": [
                {
                    "solver": one.other.key,
                    "differences": {m: asdict(d) for m, d in one.differences.items()},
                    "speed": None if one.speed is None else {**asdict(one.speed), "ratio": one.speed.ratio},
                }
                for one in v.against
            ],
        }
        for v in found
    ]
    whole_record = summary.comparison.summary() | {"distances": dict(summary.distances)}
    whole_record |= {"over_seeds": [{**asdict(group), "over": group.over} for group in seeds]}
    return {"verdicts": said, **whole_record, "versions": package_versions()}


@dataclass(frozen=True)
class PageRow:
    """A line of the page's table, as text."""

    method: str
    steps: str
    schedule: str
    parallel_nfe: int
    model_evals: str
    network_passes: str
    time: str
    cells: Mapping[str, Cell]
    ours: bool


def write_page(
    results: ResultsDirectory,
    table: Table,
    summary: Summary,
    found: Sequence[Verdict],
    said: Sequence[str],
    seeds: Sequence[OverSeeds] = (),
) -> None:
    """Write report.html, one file with all of its pictures, in the look of a run's report.

    Args:
        results: the directory, which has the pictures; the page goes there.
        table: the suite's results.
        summary: the figures behind the table.
        found: the verdicts.
        said: sentences that a reader of the table has to know.
        seeds: the runs that differ in their seed alone, summed up.

    Raises:
        RunDirectoryError: a picture is damaged, or the disk refuses.
    """
    evaluation = summary.comparison.evaluation
    columns = [Column(row.key, row) for row in ordered(evaluation) if (results.pictures / row.key).is_dir()]
    columns = columns[:SHEET_COLUMNS]
    is_fid = table.suite.name == "paper-fid"
    fid = fid_lines(table) if is_fid else {}
    ours = {sampler.key for sampler in table.suite.ours}
    with rc_context(STYLE):
        curves = {} if is_fid else cost_curves(evaluation, None)
    page = page_template("suite.html.j2").render(
        name=results.path.resolve().name,
        suite=table.suite.name,
        title=_title(table, found),
        sentences=[verdict.sentence for verdict in found][int(table.suite.table is None) :],
        facts=_facts(table, summary),
        columns=columns,
        sheet=_sheet(results, columns, summary.comparison.prompts),
        costs=curves,
        compares=table.compares,
        notes=said,
        fid={m: {nfe: _row(row, ours) for nfe, row in rows.items()} for m, rows in fid.items()},
        nfes=sorted({nfe for rows in fid.values() for nfe in rows}),
        rows=[_row(row, ours) for row in table.rows],
        metrics=table.metrics,
        seeds=seeds_grid(seeds, summary.comparison) if seeds else [],
        number=_number,
        distance=FID_METRIC,
        evaluation=evaluation,
        decimals={metric: decimals(metric) for metric in evaluation.metrics},
        solvers={row.key: row for row in evaluation.solvers},
        ours=ours,
        manifest=results.manifest.read_text(encoding="utf-8"),
    )
    write_text(results.report, page)


def _title(table: Table, found: Sequence[Verdict]) -> str:
    if table.suite.table is not None:
        return f"The paper's table {table.suite.table}, and what was measured here"
    return found[0].sentence if found else f"{len(table.suite.samplers)} solvers, compared"


def _facts(table: Table, summary: Summary) -> list[tuple[str, str]]:
    prompts, seeds = summary.comparison.prompts, summary.comparison.seeds
    counts = [(f"{len(table.suite.samplers)}", "solvers")]
    if any(prompts):
        counts.append((f"{len(prompts):,}", "prompts"))
    return [*counts, (f"{len(seeds):,}", "pictures each")]


def _sheet(
    results: ResultsDirectory, columns: Sequence[Column], prompts: Sequence[str]
) -> list[tuple[str, list[str | None]]]:
    """The rows of the contact sheet: each prompt whose pictures were kept, with a picture for each column."""
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
        model_evals=written(None if sampler is None else sampler.model_evals),
        network_passes=written(row.network_passes),
        time=duration(row.seconds),
        cells=row.cells,
        ours=sampler is not None and sampler.key in ours,
    )


def _number(metric: str, value: float, signed: bool = False) -> str:
    """Write a value as `number` does, with a minus sign in place of a hyphen."""
    return number(metric, value, signed).replace("-", "\N{MINUS SIGN}")
