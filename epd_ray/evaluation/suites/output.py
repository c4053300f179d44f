"""What a suite leaves in its directory, and says on the terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from epd_ray.evaluation.suites.definition import FID_METRIC, Suite
from epd_ray.evaluation.suites.directory import ResultsDirectory
from epd_ray.evaluation.suites.layout import Table, as_csv, differences, grid, markdown, plain, tabulate
from epd_ray.evaluation.suites.measure import FEATURES, Features
from epd_ray.evaluation.suites.page import write_page
from epd_ray.evaluation.suites.pictures import Pictures
from epd_ray.evaluation.suites.settings import FID_PICTURES
from epd_ray.evaluation.suites.subject import Subject
from epd_ray.evaluation.suites.summary import Summary, Verdict, summarise, verdicts
from epd_ray.storage.run_directory import package_versions, whole, write_text

SOURCES = {
    "paper": "The paper's values are those of arXiv 2512.22796, table {table}, on COCO captions: with another model or "
    "other prompts a difference is theirs too. The intervals are of ours alone.",
    "paper-fid": "The paper's values are those of arXiv 2507.14797, table 1 ({table}), of 50,000 pictures each by the "
    "models of EDM and Consistency Models: with another model a difference is its too.",
}
PROMPTS = "prompts.json"  # where `epd-ray ab make` looks for the prompts of two folders of pictures


def write_results(results: ResultsDirectory, subject: Subject, features: Features) -> list[str]:
    """Write results.parquet, .csv, .md, .json and the page from the shards, which are all there.

    Args:
        results: the directory.
        subject: what was measured.
        features: that the Frechet distance is taken to, if there are some.

    Returns:
        The table, the headline and where the page is, in lines.

    Raises:
        RunDirectoryError: a damaged shard, or the disk refuses.
    """
    suite = subject.suite
    summary = summarise(suite, subject.pictures, results, features.reference)
    heads = {name: head.head for name, head in subject.config.rewards.items()}
    table = tabulate(suite, summary, heads, features.is_fid)
    found, said = verdicts(suite, summary, subject.facts.guidance_scale), [subject.sentence, *notes(table)]
    _write_rows(results, suite, subject.pictures)
    if results.pictures.is_dir():
        write_text(results.pictures / PROMPTS, json.dumps(subject.pictures.prompts, indent=2))
    write_text(results.path / "results.csv", as_csv(table))
    write_text(results.path / "results.md", "\n".join(_markdown(table, summary, found, said)) + "\n")
    write_text(results.path / "results.json", json.dumps(_record(summary, found), indent=2, ensure_ascii=False) + "\n")
    write_page(results, table, summary, found, said)
    return [*plain(grid(table)), *said, *(verdict.sentence for verdict in found), f"report: {results.report}"]


def _write_rows(results: ResultsDirectory, suite: Suite, pictures: Pictures) -> None:
    """results.parquet: every picture of every sampler, without its features, one sampler in memory at a time."""
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
    """What one has to know to read the table."""
    suite = table.suite
    found = [] if suite.table is None else [SOURCES[suite.name].format(table=suite.table)]
    if FID_METRIC in table.metrics and not table.is_fid:
        found.append("The Frechet distance here is not of Inception's features, and so no FID: compare it here alone.")
    elif suite.name == "paper-fid" and table.pictures < FID_PICTURES:
        found.append(
            f"Of fewer the FID is larger, and here are {table.pictures:,}: no difference to the paper's is shown."
        )
    silent = [title for metric, title in table.metrics.items() if all(r.cells[metric].ours is None for r in table.rows)]
    if silent:
        found.append(f"No head of the configuration gives {', '.join(silent)}: name one under rewards to fill it in.")
    absent = [row.line.method for row in table.rows if row.line.sampler is None]
    if absent:
        names = ", ".join(dict.fromkeys(absent))
        found.append(f"Shown with the paper's values alone, where nothing here draws at that cost: {names}.")
    return found


def _markdown(table: Table, summary: Summary, found: Sequence[Verdict], said: Sequence[str]) -> list[str]:
    lines = [f"# Suite {table.suite.name}", "", *(line for v in found for line in (f"**{v.sentence}**", ""))]
    lines += [" ".join(said), "", *markdown(grid(table)), ""]
    if summary.comparison.differences:
        lines += ["Prompt by prompt, with 95 % intervals:", "", *markdown(differences(summary))]
    return lines


def _record(summary: Summary, found: Sequence[Verdict]) -> dict[str, object]:
    headline = [
        {
            "solver": v.sampler.key,
            "sentence": v.sentence,
            "differences": {m: asdict(d) for m, d in v.differences.items()},
            "speed": None if v.speed is None else {**asdict(v.speed), "ratio": v.speed.ratio},
        }
        for v in found
    ]
    whole_record = summary.comparison.summary() | {"distances": dict(summary.distances)}
    return {"headline": headline, **whole_record, "versions": package_versions()}
