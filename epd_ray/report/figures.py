"""The drawings on a run's page: the reward curve, quality against cost, the solver's table, and noise levels."""

import io
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from epd_ray.solvers import Solver
from epd_ray.solvers.interval import inner_sigma
from epd_ray.solvers.table import COLUMN_NAMES
from epd_ray.solvers.wording import columns_as_text

PAPER, INK, MUTED, RULE, ACCENT = "#ffffff", "#1b1d20", "#6b7078", "#d9dbdf", "#c2410c"
THEMED = {PAPER: "paper", INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent"}
"""Colour in a drawing -> the page's CSS variable, so that an inline drawing follows the reader's theme."""
ROOM = 0.06  # of an interval's line, which the number beside a point takes
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


def publish(figure: Figure, name: str, folder: Path | None) -> Markup:
    """Return a figure as SVG that uses the page's colours and font.

    Args:
        figure: a figure drawn with STYLE.
        name: makes the ids in the SVG unique within the page.
        folder: receives the figure as <name>.png; None writes no file.
    """
    if folder is not None:
        figure.savefig(folder / f"{name}.png", dpi=200, facecolor=PAPER)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # ids must be unique in the page
    for colour, name in THEMED.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)


def reward_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the reward over the iterations and, below it, the gain on held-out prompts over the start with its interval.

    Args:
        rows: the rows of metrics.jsonl; the lower part is left out if none has a gain.
    """
    checks = [row for row in rows if "validation/reward" in row]
    gains = [row for row in checks if "validation/gain" in row]
    figure = Figure(figsize=(7.2, 5.2 if gains else 3.4), layout="constrained")
    if gains:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_gain(below, gains)
    else:
        above = below = figure.subplots()
    _draw_rewards(above, rows, checks)
    below.set_xlabel("iteration")
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(loc="outside upper left", ncols=5, columnspacing=1.3, handlelength=1.2, borderpad=0)
    return figure


def _draw_rewards(axes: Axes, rows: Sequence[Mapping[str, float]], checks: Sequence[Mapping[str, float]]) -> None:
    """Draw the mean reward of each training batch, and that of the mean table on the validation prompts."""
    batches = [(row["iteration"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    if batches:
        marker = "." if len(batches) < 3 else ""
        axes.plot(*zip(*batches, strict=True), color=MUTED, alpha=0.5, lw=0.9, marker=marker, label="training batch")
    if checks:
        at, values = ([row[key] for row in checks] for key in ("iteration", "validation/reward"))
        axes.plot(at, values, color=ACCENT, lw=1.8, marker=".", label="validation")
    if best := [row for row in checks if row.get("validation/best")]:
        x, y = best[-1]["iteration"], best[-1]["validation/reward"]
        label = f"best: {y:.4f} at iteration {x:.0f}"
        axes.plot(x, y, "o", ms=9, color=ACCENT, mfc=PAPER, mew=1.8, label=label)
    _plain(axes, "reward")


def _draw_gain(axes: Axes, gains: Sequence[Mapping[str, float]]) -> None:
    at = [row["iteration"] for row in gains]
    mean, low, high = ([row[f"validation/gain{end}"] for row in gains] for end in ("", "_low", "_high"))
    axes.axhline(0, color=MUTED, lw=0.9)
    axes.fill_between(at, low, high, color=ACCENT, alpha=0.14, lw=0, label="95 % interval, paired")
    axes.plot(at, mean, color=ACCENT, lw=1.8, marker=".")
    raised = [row for row in gains if row.get("alarm/reward_hacking")]
    if raised:
        places = [row["iteration"] for row in raised], [row["validation/gain"] for row in raised]
        axes.plot(*places, "x", color=INK, ms=7, mew=1.6, label="alarm")
    _plain(axes, "gain over the start")


def _plain(axes: Axes, label: str = "") -> None:
    if label:
        axes.set_ylabel(label, labelpad=12)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def solver_drawing(tables: Mapping[str, Solver], ours: str) -> Figure:
    """Draw the points of solver tables: a line for each interval, and a circle at each point.

    The area of a circle, and the number beside it if there are at most 3 points, is the point's weight times its
    direction scale. Under the line stand the history and the guidance scale of the solver that is drawn in colour, and
    whether the interval leaves out the pass without the prompt.

    Args:
        tables: key -> solver, all with as many intervals.
        ours: the key of the solver that is drawn in colour, whose sigmas stand at the lines.
    """
    intervals = max(solver.table.intervals for solver in tables.values())
    figure = Figure(figsize=(7.2, 0.8 + 0.8 * intervals), layout="constrained")
    axes = figure.subplots()
    handles = []
    for key, solver in tables.items():
        mine = key == ours
        edge, fill, layer = (ACCENT, ACCENT, 2) if mine else (INK, "none", 3)
        look: dict[str, Any] = {"ls": "", "marker": "o", "color": edge, "mfc": fill, "zorder": layer}
        handles.append(Line2D([], [], ms=8, label="EPD + RDPO" if mine else "distilled", **look))
        table = solver.table
        shares = table.weights if table.scale_dir is None else table.weights * table.scale_dir
        for line, (positions, weights) in enumerate(zip(table.positions, shares, strict=True), 1):
            for r, w in zip(positions.tolist(), weights.tolist(), strict=True):
                axes.plot(r, line, ms=18 * math.sqrt(w), **look)
            if len(positions) <= 3:
                _write_weights(axes, line, positions.tolist(), weights.tolist(), mine)
    shown = tables.get(ours) or next(iter(tables.values()))
    sigmas = shown.sigmas.tolist()
    further = columns_as_text(replace(shown.table, scale_dir=None, scale_time=None))
    for name in (COLUMN_NAMES["positions"], COLUMN_NAMES["weights"]):
        del further[name]
    for line, values in enumerate(zip(*further.values(), strict=True), 1):
        told = ", ".join(f"{name} {value}" for name, value in zip(further, values, strict=True))
        axes.text(0.5, line + 0.32, told, color=MUTED, size=7.5, ha="center", va="center")
    for line, (a, b) in enumerate(itertools.pairwise(sigmas), 1):
        axes.plot((0, 1), (line, line), color=RULE, lw=1.4, zorder=1)
        axes.text(-0.045, line, f"{a:.3g}", color=MUTED, ha="right", va="center")
        axes.text(1.045, line, f"{b:.3g}", color=MUTED, va="center")
    axes.set(xlim=(-0.14, 1.14), ylim=(intervals + 0.6, 0.4))
    axes.set_axis_off()
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handletextpad=0.2, borderpad=0)
    return figure


def _write_weights(axes: Axes, line: int, at: Sequence[float], weights: Sequence[float], mine: bool) -> None:
    """Write the weights of an interval beside its points: ours above the line, and the others below it.

    Where a number has no room beside the one before it, it goes further from the line.
    """
    side, colour = (1, ACCENT) if mine else (-1, MUTED)
    right, level = -1.0, 0
    for r, w in zip(at, weights, strict=True):
        level = level + 1 if r - right < ROOM else 0
        right = r
        place = (0, side * (9 * math.sqrt(max(weights)) + 7 + 9 * level if level else 9 * math.sqrt(w) + 7))
        text: dict[str, Any] = {"size": 7.5, "ha": "center", "va": "center", "color": colour}
        axes.annotate(f"{w:.2f}", (r, line), place, textcoords="offset points", **text)


@dataclass(frozen=True)
class Measured:
    """A value with its interval, and what it costs.

    Attributes:
        costs: each cost by its name for people, at least 1, in the order of the panels; all points have the same names.
        mean: the value.
        low: the lower end of its interval.
        high: the upper end of its interval.
    """

    costs: Mapping[str, int]
    mean: float
    low: float
    high: float


LOOKS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (1, 1))), ("P", (0, (6, 2))))
"""The marker and line of each method in turn, so that they can be told apart without colour."""
FIRST_PANEL = 1.8  # its width as a multiple of the others', because solvers are compared at this cost


def cost_curve(methods: Mapping[str, Sequence[Measured]], ours: Collection[str], metric: str) -> Figure:
    """Draw a metric against each cost, in panels side by side, with a line and a band of intervals for each method.

    Args:
        methods: the name of each method -> its values. Beyond as many as there are LOOKS they are drawn faintly, and
            without intervals.
        ours: the names of the methods that are drawn in colour.
        metric: the metric's name for people.
    """
    costs = list(next(point for points in methods.values() for point in points).costs)
    told_apart = min(len(methods), len(LOOKS))
    figure = Figure(figsize=(7.2, 2.9 + 0.2 * math.ceil(told_apart / 2)), layout="constrained")
    ratios = (FIRST_PANEL, *[1] * (len(costs) - 1))
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False, width_ratios=ratios)[0]
    for axes, cost, ratio in zip(panels, costs, ratios, strict=True):
        for index, (name, points) in enumerate(methods.items()):
            _draw_method(axes, sorted(points, key=lambda point: point.costs[cost]), cost, name, index, name in ours)
        _cost_axis(axes, cost, sorted({p.costs[cost] for points in methods.values() for p in points}), round(6 * ratio))
    _plain(panels[0], metric)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, borderpad=0, handlelength=2.4, columnspacing=1.6)
    return figure


def _draw_method(axes: Axes, found: Sequence[Measured], cost: str, name: str, index: int, mine: bool) -> None:
    """Draw a method's line with its band, or a single point with its bar; those beyond LOOKS faintly and alone."""
    at, mean = [point.costs[cost] for point in found], [point.mean for point in found]
    if index >= len(LOOKS):
        label = "other methods" if index == len(LOOKS) else None
        axes.plot(at, mean, color=MUTED, alpha=0.45, lw=0.8, marker=".", ms=3, zorder=1, label=label)
        return
    marker, line = LOOKS[index]
    colour, layer = (ACCENT, 3) if mine else (MUTED, 2)
    low, high = [point.low for point in found], [point.high for point in found]
    if len(found) > 1:
        axes.fill_between(at, low, high, color=colour, alpha=0.13, lw=0, zorder=layer - 2)
    else:
        axes.vlines(at, low, high, color=colour, lw=1.3, zorder=layer)
    look: dict[str, Any] = {"color": colour, "marker": marker, "ls": line if len(at) > 1 else "", "zorder": layer}
    axes.plot(at, mean, label=name, lw=1.3, ms=8 if mine else 5.5, mfc=ACCENT if mine else PAPER, mew=1.3, **look)


def _cost_axis(axes: Axes, cost: str, costs: Sequence[int], numbers: int) -> None:
    """A logarithmic axis with at most about this many numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_apart(costs, numbers)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(cost)
    axes.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
    _plain(axes)


def _apart(costs: Sequence[int], numbers: int) -> list[int]:
    """The costs that have room for their number on a logarithmic axis for so many numbers, from the smallest."""
    least, most = costs[0], costs[-1]
    gap, kept = max(1.12, (most / least) ** (1 / numbers)), [least]
    for cost in costs[1:]:
        if cost >= kept[-1] * gap:
            kept.append(cost)
    return kept


def sigma_drawing(sigmas: Mapping[str, Sequence[float]], tables: Mapping[str, Solver], ours: Collection[str]) -> Figure:
    """Draw the noise levels of solvers, a line each: a stroke between intervals, and a circle at each learned point.

    Args:
        sigmas: the name of each solver -> its noise levels [N+1], decreasing.
        tables: the names of the learned solvers -> the solvers.
        ours: the names of the solvers that are drawn in colour.
    """
    figure = Figure(figsize=(7.2, 0.75 + 0.42 * len(sigmas)), layout="constrained")
    axes = figure.subplots()
    most, least = max(map(max, sigmas.values())), min(s for row in sigmas.values() for s in row if s > 0)
    for line, (name, row) in enumerate(sigmas.items()):
        colour = ACCENT if name in ours else INK
        axes.plot((min(row), max(row)), (line, line), color=RULE, lw=1.2, zorder=1)
        axes.plot(row, [line] * len(row), ls="", marker="|", ms=11, mew=1.2, color=colour, zorder=2)
        if name in tables:
            solver = tables[name]
            ends = itertools.pairwise(solver.sigmas.tolist())
            rows = zip(ends, solver.table.positions.tolist(), strict=True)
            points = [float(inner_sigma(a, b, r)) for (a, b), positions in rows for r in positions]
            axes.plot(points, [line] * len(points), ls="", marker="o", ms=5, color=colour, mfc=PAPER, mew=1.3, zorder=3)
    if most > 2:  # the noise levels of a model in VE form span orders of magnitude
        axes.set_xscale("symlog", linthresh=least)
    axes.invert_xaxis()
    axes.set_ylim(len(sigmas) - 0.4, -0.6)
    axes.set_yticks(range(len(sigmas)), list(sigmas))
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("noise level sigma")
    return figure
