"""One document of what several commands measured, with each figure beside the command that made it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from epd_ray.errors import RunDirectoryError, shown
from epd_ray.evaluation.suites.tables import markdown
from epd_ray.report.page import page_template
from epd_ray.report.tables import figures_of, text
from epd_ray.storage.documents import read_json
from epd_ray.storage.run_directory import write_text
from epd_ray.telemetry.provenance import Provenance, signed_by

DOCUMENT, PAGE = "results.md", "results.html"


@dataclass(frozen=True)
class Section:
    """What one command measured.

    Attributes:
        title: the section's title.
        body: the section's Markdown, without headings.
        made_by: the commands, and the machine that they ran on.
    """

    title: str
    body: str
    made_by: Provenance

    def markdown(self) -> str:
        """The section's Markdown with its heading and its commands."""
        commands = "\n".join(self.made_by.commands)
        return f"## {self.title}\n\n{self.body}\n\n```bash\n{commands}\n```\n\n{self.made_by.where}.\n"


def write_document(title: str, sources: Sequence[Path], out: Path) -> list[str]:
    """Write results.md and results.html from the results of suites and benchmarks.

    Args:
        title: the document's title.
        sources: directories of `evaluate --suite` and files of `bench --out`, in the order of the sections.
        out: the directory of the document; it is made if it is missing.

    Returns:
        The paths of the two files, as lines for the terminal.

    Raises:
        RunDirectoryError: a source is neither of these or cannot be read, and nothing is written; or the disk refuses.
    """
    sections = [section for source in sources for section in read_sections(source)]
    document = "\n".join([f"# {title}", "", *(section.markdown() for section in sections)])
    # Raw HTML is off, so that a prompt or a file name cannot put markup into the page.
    body = Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render(document))
    page = page_template("results.html.j2").render(title=title, body=body)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / DOCUMENT, document)
    write_text(out / PAGE, page)
    return [f"document: {out / DOCUMENT}", f"page: {out / PAGE}"]


def read_sections(source: Path) -> list[Section]:
    """Read a source as sections: one for a suite, or one for each case of a benchmark.

    Raises:
        RunDirectoryError: the source is neither of these, or is damaged.
    """
    if not (source / "results.md").is_file() and not (source.suffix == ".json" and source.is_file()):
        raise RunDirectoryError(
            f"{source} holds no results: name directories of epd-ray evaluate --suite, or files of epd-ray bench --out"
        )
    try:
        if source.is_dir():
            return [_suite(source)]
        cases, made_by = _record(source)
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{source} cannot be read ({shown(error)}): measure it again") from error
    return [Section(f"Benchmark {case}", "\n".join(_tables(found)), made_by) for case, found in cases.items()]


def _suite(source: Path) -> Section:
    first, _, body = (source / "results.md").read_text(encoding="utf-8").partition("\n")
    return Section(first.removeprefix("# ").strip(), body.strip(), signed_by(source))


def _record(source: Path) -> tuple[dict[str, dict[str, Any]], Provenance]:
    """Read a benchmark's figures by case, and the commands that made them.

    Raises:
        RunDirectoryError: it is damaged.
        ValueError: it has another form.
    """
    record = read_json(source, RunDirectoryError, "measure it again")
    cases = record.get("cases") if isinstance(record, dict) else None
    if not isinstance(cases, dict) or not all(isinstance(found, dict) for found in cases.values()):
        raise ValueError("cases is no mapping of mappings")
    return cases, Provenance.read(record.get("made_by"))


def _tables(found: Mapping[str, Any]) -> list[str]:
    """Write a benchmark's figures as Markdown: a table of single figures, then one with a row for each group."""
    single, rows = figures_of(found)
    lines = markdown([["figure", "value"], *([name, text(value)] for name, value in single.items())]) if single else []
    if rows:
        columns = list(dict.fromkeys(figure for row in rows.values() for figure in row))
        body = [[head, *(text(row[c]) if c in row else "" for c in columns)] for head, row in rows.items()]
        lines += ["", *markdown([["", *columns], *body])]
    return lines
