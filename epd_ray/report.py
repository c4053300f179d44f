"""A run as one self-contained page: what was gained, at which cost, and how it looks."""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, TypeAdapter, ValidationError

from epd_ray.errors import RunDirectoryError
from epd_ray.page import data_uri, open_picture, page_template, signed
from epd_ray.solvers import Solver
from epd_ray.statistics import Interval
from epd_ray.store import RunDirectory, read_metrics, write_text

OURS, BASE = "rdpo", "distilled"
PAPER, INK, MUTED, RULE, ACCENT = "#ffffff", "#1b1d20", "#6b7078", "#d9dbdf", "#c2410c"
THEMED = {PAPER: "paper", INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent"}
"""Colours of the pictures -> the page's CSS variables, so that an inline drawing follows the reader's theme."""
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "epd-ray",
}
SHEET_ROWS = 8
SHEET_COLUMNS = 8


class SolverRow(BaseModel):
    """One solver's line in evaluation.json."""

    key: str
    label: str
    kind: str
    intervals: int
    parallel_nfe: int
    model_evals: int
    seconds_per_image: float | None = None
    metrics: dict[str, Interval]


class Difference(BaseModel):
    """A paired difference, solver minus against, with its 95 % interval."""

    metric: str
    solver: str
    against: str
    mean: float
    low: float
    high: float


class Evaluation(BaseModel):
    """evaluation.json: every solver on the same prompts and seeds."""

    split: str
    prompts: int
    metrics: list[str]
    solvers: list[SolverRow]
    differences: list[Difference] = []

    def solver(self, key: str) -> SolverRow | None:
        return next((row for row in self.solvers if row.key == key), None)


@dataclass(frozen=True)
class Column:
    """A solver across the contact sheet; `row` is None before the evaluation is there."""

    key: str
    row: SolverRow | None

    @property
    def label(self) -> str:
        return self.row.label if self.row else self.key

    @property
    def costs(self) -> str:
        return f"parallel NFE {self.row.parallel_nfe} · {self.row.model_evals} evals" if self.row else ""


@dataclass(frozen=True)
class Headline:
    """The result in one sentence, and how to read it."""

    sentence: str
    note: str


def write_report(run: Path) -> Path:
    """Write report.html and its pictures from what the run has so far.

    Args:
        run: a run directory, finished or not; a part that is missing becomes a sentence saying so.

    Returns:
        The page: one file, no network.

    Raises:
        RunDirectoryError: no run there, or a file in it that cannot be read.
        TableError: a solver.json that is not a solver.
    """
    files = RunDirectory(run)
    if not (files.config.is_file() or files.metrics.is_file() or files.evaluation.is_file()):
        raise RunDirectoryError(f"{run} holds no run: config.yaml, metrics.jsonl and evaluation.json are all missing")
    rows, evaluation = read_metrics(files.metrics), _load(Evaluation, files.evaluation)
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
        with rc_context(STYLE):
            curve = _publish(_reward_curve(rows), files.images / "reward_curve.png") if rows else None
            drawing = _publish(_solver_drawing(tables), files.images / "solver_table.png") if tables else None
        page = page_template("report.html.j2").render(
            name=run.resolve().name,
            headline=_headline(evaluation, rows),
            facts=_facts(rows),
            evaluation=evaluation,
            decimals={metric: _decimals(evaluation, metric) for metric in evaluation.metrics} if evaluation else {},
            solvers={row.key: row for row in evaluation.solvers} if evaluation else {},
            ours=OURS,
            columns=columns,
            sheet=[
                (prompt, [data_uri(files.samples / column.key / f"{index:03d}.png") for column in columns])
                for index, prompt in enumerate(prompts)
            ],
            curve=curve,
            has_validation=any("validation/reward" in row for row in rows),
            drawing=drawing,
            timings=_timings(rows),
            stages=_load(dict[str, float], files.stages) or {},
            config=files.config.read_text(encoding="utf-8") if files.config.is_file() else None,
            versions=_load(dict[str, str], files.versions),
        )
        write_text(files.report, page)
    except OSError as error:
        raise RunDirectoryError(f"cannot write the report of {run}: {error.strerror or error}") from error
    return files.report


def contact_sheet(run: Path, columns: list[str], rows: int) -> Image.Image:
    """The same prompts and seeds (down) through several solvers (across).

    Args:
        run: a run directory with images/samples.
        columns: solver keys, folders of images/samples.
        rows: how many prompts, from the first; fewer where there are fewer.

    Returns:
        RGB, captions left of the pictures, labels with both costs above them; an absent picture stays blank.

    Raises:
        RunDirectoryError: no prompts.json, no such column, or a damaged picture.
    """
    files = RunDirectory(run)
    prompts = (_load(list[str], files.samples / "prompts.json") or [])[:rows]
    if not prompts or not columns:
        raise RunDirectoryError(f"{files.samples} has no prompts.json with prompts, or no columns were asked for")
    if missing := [key for key in columns if not (files.samples / key).is_dir()]:
        raise RunDirectoryError(f"{files.samples} has no folder {missing[0]!r}")
    known = _load(Evaluation, files.evaluation)
    side, gap, caption, head = 192, 12, 264, 92
    width, height = caption + len(columns) * (side + gap) + gap, head + len(prompts) * (side + gap) + gap
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    label_font, small_font, text_font = (ImageFont.load_default(size) for size in (17, 14, 17))
    for index, column in enumerate(Column(key, known.solver(key) if known else None) for key in columns):
        x = caption + gap + index * (side + gap)
        label = "\n".join(textwrap.wrap(column.label, 20, max_lines=2))
        draw.multiline_text((x, head - 34), label, ACCENT if column.key == OURS else INK, label_font, anchor="ld")
        draw.text((x, head - 14), column.costs, MUTED, small_font, anchor="ls")
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
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise RunDirectoryError(f"{path} cannot be read: {where}{first['msg']}") from error


def _columns(files: RunDirectory, evaluation: Evaluation | None) -> list[Column]:
    """The solvers that have pictures: in the evaluation's order, then by name."""
    folders = sorted(folder.name for folder in files.samples.iterdir() if folder.is_dir())
    known = [row.key for row in evaluation.solvers] if evaluation else []
    keys = [key for key in known if key in folders] + [key for key in folders if key not in known]
    return [Column(key, evaluation.solver(key) if evaluation else None) for key in keys[:SHEET_COLUMNS]]


def _headline(evaluation: Evaluation | None, rows: Sequence[Mapping[str, float]]) -> Headline:
    if evaluation is None or not evaluation.metrics:
        best = next((row for row in reversed(rows) if row.get("validation/best")), None)
        if best is None:
            return Headline("There is no result yet.", "The comparison with other solvers comes at the end of a run.")
        so_far = f"Best validation reward so far: {best['validation/reward']:.4f}, at iteration {best['iteration']}."
        return Headline(so_far, "The comparison on held-out prompts comes at the end of a run.")
    metric = evaluation.metrics[0]
    digits = _decimals(evaluation, metric)
    ours, base = evaluation.solver(OURS), evaluation.solver(BASE)
    found = [d for d in evaluation.differences if (d.metric, d.solver, d.against) == (metric, OURS, BASE)]
    if not (ours and base and found):
        return Headline(
            f"{len(evaluation.solvers)} solvers, compared on {evaluation.prompts} prompts.", f"In {metric}."
        )
    gain, scores = (
        found[0],
        f"{ours.metrics[metric].mean:.{digits}f} vs distilled {base.metrics[metric].mean:.{digits}f}",
    )
    held_out = "held-out prompts" if evaluation.split == "test" else f"prompts of the {evaluation.split} split"
    mean, low, high = (signed(value, digits) for value in (gain.mean, gain.low, gain.high))
    where = f"{evaluation.prompts} {held_out} at parallel NFE {ours.parallel_nfe}"
    sentence = f"EPD + RDPO {scores}: {mean} [{low},\N{NO-BREAK SPACE}{high}] on {where}"
    if gain.low > 0:
        verdict = "RDPO improved the table it started from."
    elif gain.high < 0:
        verdict = "RDPO made the table it started from worse."
    else:
        verdict = "The interval contains 0: this evaluation does not show a difference."
    return Headline(sentence, f"{verdict} Metric: {metric}; 95 % interval of the paired difference.")


def _facts(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """What the run amounts to, as (value, name)."""
    if not rows:
        return []
    images, seconds = sum(row.get("images", 0) for row in rows), sum(row.get("time/iteration", 0) for row in rows)
    facts = [(f"{rows[-1]['iteration']:.0f}", "iterations"), (f"{images:,.0f}", "images")]
    if seconds > 0:
        facts += [(f"{images / seconds:.1f}", "images per second"), (f"{seconds / 60:,.1f}", "minutes")]
    return facts


def _timings(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, float]]:
    """Median seconds per iteration of each phase, the whole iteration first."""
    phases = [f"time/{phase}" for phase in ("iteration", "generate", "score", "learn", "wait")]
    phases += sorted({name for row in rows for name in row if name.startswith("time/")} - set(phases))
    found = {phase: [row[phase] for row in rows if phase in row] for phase in phases}
    return [(phase.removeprefix("time/"), float(np.median(values))) for phase, values in found.items() if values]


def _decimals(evaluation: Evaluation, metric: str) -> int:
    """Enough decimals for two digits of the narrowest half-width, between 3 and 5."""
    widths = [d.high - d.low for d in evaluation.differences if d.metric == metric]
    narrowest = min((width / 2 for width in widths if width > 0), default=0.01)
    return min(5, max(3, 1 - math.floor(math.log10(narrowest))))


def _publish(figure: Figure, path: Path) -> Markup:
    """Save the PNG, and return the drawing as SVG in the page's own colours and font."""
    figure.savefig(path, dpi=200, facecolor=PAPER)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{path.stem}-", svg)  # ids are shared by the whole page
    for colour, name in THEMED.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)


def _reward_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Reward over iterations: training batches, and the mean table on the validation split."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    batches = [(row["iteration"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    if batches:
        marker = "." if len(batches) < 3 else ""
        axes.plot(*zip(*batches, strict=True), color=MUTED, alpha=0.5, lw=0.9, marker=marker, label="training batch")
    checks = [row for row in rows if "validation/reward" in row]
    if checks:
        at = [row["iteration"] for row in checks]
        low, high = (
            [row.get(f"validation/{end}", row["validation/reward"]) for row in checks] for end in ("low", "high")
        )
        axes.fill_between(at, low, high, color=ACCENT, alpha=0.14, lw=0, label="95 % interval")
        axes.plot(
            at, [row["validation/reward"] for row in checks], color=ACCENT, lw=1.8, marker=".", label="validation"
        )
    if best := [row for row in checks if row.get("validation/best")]:
        x, y = best[-1]["iteration"], best[-1]["validation/reward"]
        label = f"best: {y:.4f} at iteration {x:.0f}"
        axes.plot(x, y, "o", ms=9, color=ACCENT, mfc=PAPER, mew=1.8, label=label)
    axes.set_xlabel("iteration")
    axes.set_ylabel("reward", labelpad=12)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=4, columnspacing=3, handlelength=1.4, borderpad=0)
    return figure


def _solver_drawing(tables: Mapping[str, Solver]) -> Figure:
    """Where each interval looks (circles on its line) and how it weighs what it sees (their area)."""
    intervals = max(solver.table.intervals for solver in tables.values())
    figure = Figure(figsize=(7.2, 0.8 + 0.66 * intervals), layout="constrained")
    axes = figure.subplots()
    handles = []
    for key, solver in tables.items():
        ours = key == OURS
        edge, fill, layer = (ACCENT, ACCENT, 2) if ours else (INK, "none", 3)
        look: dict[str, Any] = {"ls": "", "marker": "o", "color": edge, "mfc": fill, "zorder": layer}
        handles.append(Line2D([], [], ms=8, label="EPD + RDPO" if ours else "distilled", **look))
        for line, (positions, weights) in enumerate(zip(solver.table.positions, solver.table.weights, strict=True), 1):
            for r, w in zip(positions.tolist(), weights.tolist(), strict=True):
                axes.plot(r, line, ms=18 * math.sqrt(w), **look)
                if len(positions) <= 3:
                    above, colour = (1, ACCENT) if ours else (-1, MUTED)
                    text: dict[str, Any] = {"size": 7.5, "ha": "center", "va": "center", "color": colour}
                    place = (0, above * (9 * math.sqrt(w) + 7))
                    axes.annotate(f"{w:.2f}", (r, line), place, textcoords="offset points", **text)
    sigmas = next(iter(tables.values())).sigmas.tolist()
    for line, (a, b) in enumerate(itertools.pairwise(sigmas), 1):
        axes.plot((0, 1), (line, line), color=RULE, lw=1.4, zorder=1)
        axes.text(-0.045, line, f"{a:.3g}", color=MUTED, ha="right", va="center")
        axes.text(1.045, line, f"{b:.3g}", color=MUTED, va="center")
    axes.set(xlim=(-0.14, 1.14), ylim=(intervals + 0.6, 0.4))
    axes.set_axis_off()
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handletextpad=0.2, borderpad=0)
    return figure
