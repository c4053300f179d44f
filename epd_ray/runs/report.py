"""The report of a run: one self-contained page with its results, its costs and its pictures."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter, ValidationError

from epd_ray.drawing.sampler import EPD
from epd_ray.errors import RunDirectoryError, first_problem, shown
from epd_ray.evaluation.drawings import cost_curves, noise_levels
from epd_ray.evaluation.records import OURS, SHEET_COLUMNS, Column, Evaluation, SolverRow, read_evaluation
from epd_ray.evaluation.validation import read_curve
from epd_ray.evaluation.verdict import against_start, ordered, verdicts
from epd_ray.evaluation.wording import decimals
from epd_ray.report.figures import ACCENT, INK, MUTED, PAPER, STYLE, publish, reward_curve, solver_drawing
from epd_ray.report.page import data_uri, open_picture, page_template
from epd_ray.runs.held_out import early_end, held_out
from epd_ray.runs.origin import read_origin
from epd_ray.solvers import Solver
from epd_ray.storage.run_directory import RunDirectory, read_metrics, unreadable, write_text
from epd_ray.telemetry.progress import counted

BASE = "distilled"
SHEET_ROWS = 8


@dataclass(frozen=True)
class Headline:
    """The result in one sentence, and a note that explains it."""

    sentence: str
    note: str | None


def write_report(run: Path) -> Path:
    """Write report.html and its pictures from the files that the run has so far.

    Args:
        run: a run directory. The run may be unfinished: the page says which results are missing.

    Returns:
        The path of the page, a single file that needs no network.

    Raises:
        RunDirectoryError: the directory holds no run, or a file in it cannot be read.
        TableError: a solver.json is not a solver.
    """
    files = RunDirectory(run)
    if not (files.config.is_file() or files.metrics.is_file() or files.evaluation.is_file()):
        raise RunDirectoryError(f"{run} holds no run: config.yaml, metrics.jsonl and evaluation.json are all missing")
    origin = read_origin(files)
    rows = read_metrics(files.metrics)
    evaluation = read_evaluation(files.evaluation) if files.evaluation.is_file() else None
    tables = {
        key: Solver.from_pretrained(folder)
        for key, folder in ((BASE, files.distilled), (OURS, files.solver))
        if (folder / "solver.json").is_file()
    }
    prompts = (_load(list[str], files.samples / "prompts.json") or [])[:SHEET_ROWS]
    columns = _columns(files, evaluation) if prompts else []
    try:
        files.images.mkdir(exist_ok=True)
        if columns:
            contact_sheet(run, [column.key for column in columns], SHEET_ROWS).save(files.images / "contact_sheet.png")
        page = page_template("report.html.j2").render(
            name=run.resolve().name,
            headline=_headline(evaluation, rows),
            facts=_facts(rows),
            evaluation=evaluation,
            decimals={metric: decimals(evaluation, metric) for metric in evaluation.metrics} if evaluation else {},
            solvers={row.key: row for row in evaluation.solvers} if evaluation else {},
            rows=_by_cost(evaluation) if evaluation else [],
            ours=[OURS],
            columns=columns,
            sheet=[
                (prompt, [data_uri(files.samples / column.key / f"{index:03d}.png") for column in columns])
                for index, prompt in enumerate(prompts)
            ],
            held_out=held_out(read_curve(files.validation), rows),
            ended=early_end(rows),
            has_validation=any("validation/reward" in row for row in rows),
            **_drawings(files, rows, evaluation, tables),
            timings=_timings(rows),
            stages=_load(dict[str, float], files.stages) or {},
            config=files.config.read_text(encoding="utf-8") if files.config.is_file() else None,
            accepted=origin.accepted if origin else (),
            versions=_load(dict[str, str], files.versions),
        )
        write_text(files.report, page)
    except OSError as error:
        raise RunDirectoryError(f"cannot write the report of {run}: {error.strerror or error}") from error
    return files.report


def _drawings(
    files: RunDirectory,
    rows: Sequence[Mapping[str, float]],
    evaluation: Evaluation | None,
    tables: Mapping[str, Solver],
) -> dict[str, Any]:
    """The drawings of the page by their name in the template; each is also written to the folder of the pictures."""
    folder = files.images
    with rc_context(STYLE):
        return {
            "curve": publish(reward_curve(rows), "reward_curve", folder) if rows else None,
            "drawing": publish(solver_drawing(tables, OURS), "solver_table", folder) if tables else None,
            "costs": cost_curves(evaluation, folder) if evaluation else {},
            "noise": noise_levels(evaluation, tables, folder) if evaluation else None,
        }


def contact_sheet(run: Path, columns: list[str], rows: int) -> Image.Image:
    """Draw a sheet of pictures with one row per prompt and seed, and one column per solver.

    Args:
        run: a run directory with images/samples.
        columns: the keys of the solvers, which are folders in images/samples.
        rows: the largest number of prompts, from the first.

    Returns:
        An RGB image with the prompts on the left, and the names and costs of the solvers at the top. Where a picture is
        missing, its place stays blank.

    Raises:
        RunDirectoryError: prompts.json or a column is missing, or a picture is damaged.
    """
    files = RunDirectory(run)
    prompts = (_load(list[str], files.samples / "prompts.json") or [])[:rows]
    if not prompts or not columns:
        raise RunDirectoryError(f"{files.samples} has no prompts.json with prompts, or no columns were asked for")
    if missing := [key for key in columns if not (files.samples / key).is_dir()]:
        raise RunDirectoryError(f"{files.samples} has no folder {shown(missing[0])}")
    known = read_evaluation(files.evaluation) if files.evaluation.is_file() else None
    side, gap, caption, head = 192, 12, 264, 110
    width, height = caption + len(columns) * (side + gap) + gap, head + len(prompts) * (side + gap) + gap
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    label_font, small_font, text_font = (ImageFont.load_default(size) for size in (17, 14, 17))
    for index, column in enumerate(Column(key, known.solver(key) if known else None) for key in columns):
        x = caption + gap + index * (side + gap)
        label = "\n".join(textwrap.wrap(column.label, 20, max_lines=2))
        draw.multiline_text((x, head - 50), label, ACCENT if column.key == OURS else INK, label_font, anchor="ld")
        costs = "\n".join(column.costs.rsplit(" · ", 1))
        draw.multiline_text((x, head - 10), costs, MUTED, small_font, anchor="ld")
        for row in range(len(prompts)):
            if picture := open_picture(files.samples / column.key / f"{row:03d}.png"):
                sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, head + row * (side + gap)))
    for row, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, 26, max_lines=7, placeholder=" ..."))
        middle = head + row * (side + gap) + side // 2
        draw.multiline_text((2 * gap, middle), text, INK, text_font, anchor="lm", spacing=7)
    return sheet


def _load(kind: Any, path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except ValidationError as error:
        raise RunDirectoryError(f"{path} cannot be read: {first_problem(error)}") from error


def _columns(files: RunDirectory, evaluation: Evaluation | None) -> list[Column]:
    """The solvers that have pictures: the principal ones, then those of the evaluation, then by name."""
    folders = sorted(folder.name for folder in files.samples.iterdir() if folder.is_dir())
    known = [row.key for row in ordered(evaluation)] if evaluation else []
    keys = [key for key in known if key in folders] + [key for key in folders if key not in known]
    return [Column(key, evaluation.solver(key) if evaluation else None) for key in keys[:SHEET_COLUMNS]]


def _headline(evaluation: Evaluation | None, rows: Sequence[Mapping[str, float]]) -> Headline:
    if evaluation is None or not evaluation.metrics:
        best = next((row for row in reversed(rows) if row.get("validation/best")), None)
        if best is None:
            return Headline("There is no result yet.", "The comparison with other solvers comes at the end of a run.")
        so_far = f"Best validation reward so far: {best['validation/reward']:.4f}, at iteration {best['iteration']}."
        return Headline(so_far, "The comparison on held-out prompts comes at the end of a run.")
    found = verdicts(evaluation)
    if not found:
        compared = f"{counted(len(evaluation.solvers), 'solver')} on {counted(evaluation.prompts, 'prompt')}"
        return Headline(f"{compared}, compared.", "No metric says which of them is better.")
    return Headline(found[0].sentence, against_start(evaluation, BASE))


def _by_cost(evaluation: Evaluation) -> list[SolverRow]:
    """The learned solvers, then the others from the cheapest."""
    ours = evaluation.ours
    return sorted(evaluation.solvers, key=lambda row: (row.kind != EPD, row.key not in ours, row.model_evals))


def _facts(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """Totals of fine-tuning with its validations, as pairs (value, name)."""
    if not rows:
        return []
    images, seconds = sum(row.get("images", 0) for row in rows), sum(row.get("time/total", 0) for row in rows)
    facts = [(f"{rows[-1]['iteration']:.0f}", "iterations"), (f"{images:,.0f}", "images")]
    if seconds > 0:
        facts += [(f"{images / seconds:.1f}", "images per second"), (f"{seconds / 60:,.1f}", "minutes of fine-tuning")]
    return facts


def _timings(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, float]]:
    """The median seconds per iteration of each phase; the whole training step comes first."""
    phases = [f"time/{phase}" for phase in ("iteration", "generate", "score", "learn", "wait")]
    phases += sorted({name for row in rows for name in row if name.startswith("time/")} - {"time/total", *phases})
    found = {phase: [row[phase] for row in rows if phase in row] for phase in phases}
    return [(phase.removeprefix("time/"), float(np.median(values))) for phase, values in found.items() if values]
