import json
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from PIL import Image

from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.validation import Curve, Validation, write_curve
from epd_ray.report.figures import STYLE, Measured, cost_curve, sigma_drawing, solver_drawing
from epd_ray.runs.report import contact_sheet, write_report
from epd_ray.solvers import Solver, SolverTable
from epd_ray.storage.run_directory import RunDirectory, read_metrics

NASTY = '<b>&" a small red circle</b><script>alert(1)</script>'
SOLVERS = [
    ("rdpo", "EPD + RDPO (ours)", "epd", 3, 6, 9, 0.831),
    ("distilled", "EPD, distilled", "epd", 3, 6, 9, 0.822),
    ("euler-6", "Euler", "euler", 6, 6, 6, 0.801),
    ("euler-9", "Euler", "euler", 9, 9, 9, 0.812),
    ("heun-3", "Heun", "heun", 3, 6, 6, 0.742),
    ("ipndm-6", "iPNDM", "ipndm", 6, 6, 6, 0.805),
    ("euler-50", "Euler", "euler", 50, 50, 50, 0.9),
]


GAIN = {"": 0.0, "_low": -0.002, "_high": 0.0021}


def around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def write_evaluation(run: RunDirectory, gain: float = 0.009) -> None:
    solvers = [
        {
            "key": key,
            "label": label,
            "kind": kind,
            "intervals": intervals,
            "parallel_nfe": nfe,
            "model_evals": evals,
            "network_passes": 2 * evals,
            "seconds_per_image": 0.0061 * evals,
            "sigmas": np.linspace(1, 0.0089, intervals + 1).tolist(),
            "metrics": {"clip": around(score, 0.011), "scene_accuracy": around(score - 0.25, 0.06)},
        }
        for key, label, kind, intervals, nfe, evals, score in SOLVERS
    ]
    differences = [
        {"metric": metric, "solver": "rdpo", "against": key, **around(scale * (gain + 0.822 - score), half)}
        for metric, scale, half in (("clip", 1, 0.0042), ("scene_accuracy", 2, 0.031))
        for key, *_, score in SOLVERS[1:]
    ]
    evaluation = {"split": "test", "prompts": 128, "metrics": ["clip", "scene_accuracy"], "solvers": solvers}
    evaluation |= {"reference": "euler-50", "guidance_scale": 7.0}
    run.evaluation.write_text(json.dumps(evaluation | {"differences": differences}))


def write_metrics(run: RunDirectory, iterations: int = 60) -> None:
    rng, best, lines = np.random.default_rng(3), 0.0, []
    for iteration in range(1, iterations + 1):
        level = 0.822 + 0.009 * (1 - np.exp(-iteration / 18))
        row: dict[str, Any] = {"iteration": iteration, "images": 32, "reward/mean": level + rng.normal(0, 0.006)}
        row |= {"time/iteration": 2.4, "time/generate": 2.1 + rng.normal(0, 0.1), "time/score": 0.4, "time/learn": 0.09}
        row |= {"time/wait": 0.2, "time/total": 3.0, "policy/entropy": -3.0}
        if iteration % 5 == 0:
            value = level + rng.normal(0, 0.0007)
            row |= {"validation/reward": value, "validation/low": value - 0.03, "validation/high": value + 0.03}
            row |= {f"validation/gain{end}": value - 0.822 + off for end, off in GAIN.items()}
            row["alarm/reward_hacking"] = float(iteration in (45, 50))
            if value > best:
                best = value
                row["validation/best"] = 1.0
        lines.append(json.dumps(row))
    run.metrics.write_text("\n".join(lines) + "\n")


def write_validation(run: RunDirectory) -> None:
    """A curve whose watched head falls in the end."""
    prompts, rng = tuple(f"prompt {i}" for i in range(48)), np.random.default_rng(5)
    curve, spread = Curve(prompts, tuple(range(48)), ("clip",)), rng.normal(0, 0.1, 48)
    for row in read_metrics(run.metrics):
        if "validation/gain" in row:
            clip = (0.822 + spread + row["validation/gain"] + rng.normal(0, 0.003, 48)).astype(np.float32)
            lost = 0.4 + spread - 0.04 * (row["iteration"] > 40) + rng.normal(0, 0.02, 48)
            scores = {"clip": clip, "aesthetic": lost.astype(np.float32)}
            curve = curve.extended(Validation(int(row["iteration"]), clip, scores))
    write_curve(run.validation, curve)


def write_solver(folder: Path, positions: list[list[float]], weights: list[list[float]]) -> None:
    folder.mkdir()
    table = {"sigmas": [1.0, 0.89, 0.62, 0.0089], "positions": positions, "weights": weights, "meta": {}}
    absent = {"format_version": 1, "form": "flow", "afs": False, "order": 1, "scale_dir": None, "scale_time": None}
    (folder / "solver.json").write_text(json.dumps(absent | table))


def write_samples(run: RunDirectory, prompts: list[str]) -> None:
    rng = np.random.default_rng(7)
    colours = rng.integers(40, 220, (len(prompts), 2, 3))
    for key, *_ in SOLVERS:
        folder = run.samples / key
        folder.mkdir(parents=True)
        for index, (back, front) in enumerate(colours):
            pixels = np.full((64, 64, 3), back) + rng.normal(0, 4, (64, 64, 3))
            y, x = np.ogrid[:64, :64]
            pixels[(x - 20 - 6 * index % 24) ** 2 + (y - 32) ** 2 < 150] = front
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    (run.samples / "prompts.json").write_text(json.dumps(prompts))


def make_run(path: Path) -> RunDirectory:
    config = (
        "seed: 0\nbackbone:\n  name: shapes\n  source: https://example.org/<model>\nrdpo:\n  learning_rate: 0.001\n"
    )
    run = RunDirectory.create(path, config)
    write_evaluation(run)
    write_metrics(run)
    write_validation(run)
    write_solver(run.distilled, [[0.3, 0.7]] * 3, [[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    write_solver(run.solver, [[0.35, 0.8], [0.25, 0.66], [0.21, 0.6]], [[0.7, 0.3], [0.42, 0.58], [0.82, 0.18]])
    write_samples(run, [NASTY, *(f"a small red circle left of a large blue star, number {i}" for i in range(5))])
    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = make_run(tmp_path_factory.mktemp("report") / "demo")
    assert write_report(run.path) == run.report
    return run


class Loads(HTMLParser):
    """Collects every address that a browser would fetch, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(page)
        self.addresses += re.findall(r"url\(([^)]*)\)", page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        wanted = {"src", "href", "xlink:href", "srcset", "data", "action"}
        self.addresses += [value for name, value in attrs if name in wanted and value]

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def test_page_is_self_contained(full: RunDirectory) -> None:
    loads = Loads(full.report.read_text())
    assert len([a for a in loads.addresses if a.startswith("data:image/webp;base64,")]) == 6 * len(SOLVERS)
    assert [a for a in loads.addresses if not a.startswith(("data:image/", "#"))] == []
    assert loads.tags.isdisjoint({"script", "link", "iframe", "b>&"})


def test_page_has_every_section(full: RunDirectory) -> None:
    loads = Loads(full.report.read_text())
    for text in (
        "On 128 prompts at guidance scale 7, EPD + RDPO (ours) (parallel NFE 6, 9 evaluations, 18 network "
        "passes) is worse than 50 steps",
        "it is better than Euler with 18 network passes in clip (+0.0190 [+0.0148, +0.0232])",
        "It is better than the table that it began with in clip (+0.0090 [+0.0048, +0.0132])",
        "network passes",
        "noise level sigma",
        "iPNDM",
        "seconds",
        "best: 0.83",
        "validation",
        "gain over the start",
        "95 % interval, paired",
        "aestheticwatched",
        "Reward hacking? at iteration 45 the held-out reward is up by +0.0",
        "generate",
    ):
        assert text in loads.text
    assert "learning_rate: 0.001" in loads.text
    assert "transformers" in loads.text
    assert " yet." not in loads.text


def test_rate_and_length_count_validation(full: RunDirectory) -> None:
    """60 iterations of 32 images and 3.0 s, of which training steps are 2.4."""
    facts = Loads(full.report.read_text()).text
    for value, name in (("1,920", "images"), ("10.7", "images per second"), ("3.0", "minutes of fine-tuning")):
        assert f"{name}{value}" in facts


def test_prompts_are_escaped(full: RunDirectory) -> None:
    page = full.report.read_text()
    assert "<script" not in page
    assert NASTY in Loads(page).text


def test_pictures_follow_the_theme(full: RunDirectory) -> None:
    drawings = re.findall(r"<svg.*?</svg>", full.report.read_text(), flags=re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        assert "var(--accent)" in drawing
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawing)) == set()
    ids = re.findall(r'\bid="([^"]+)"', "".join(drawings))
    assert len(ids) == len(set(ids))
    for name in ("reward_curve", "solver_table", "contact_sheet", "cost_clip", "cost_scene_accuracy", "sigmas"):
        with Image.open(full.images / f"{name}.png", formats=["PNG"]) as picture:
            assert picture.width > 1000


def test_the_same_run_gives_the_same_page(full: RunDirectory) -> None:
    before = full.report.read_bytes()
    write_report(full.path)
    assert full.report.read_bytes() == before


@pytest.mark.parametrize(("gain", "said"), [(0.001, "level with"), (-0.02, "worse than")])
def test_headline_is_honest(tmp_path: Path, gain: float, said: str) -> None:
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    write_evaluation(run, gain)
    text = Loads(write_report(run.path).read_text()).text
    assert f"It is {said} the table that it began with in clip" in text
    assert "is worse than 50 steps of Euler in clip" in text
    assert ("\N{MINUS SIGN}0.0032" if gain > 0 else "\N{MINUS SIGN}0.0200") in text


def test_partial_runs(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    text = Loads(write_report(run.path).read_text()).text
    assert text.count(" yet.") == 9
    assert list(run.images.iterdir()) == []
    write_metrics(run, iterations=1)
    text = Loads(write_report(run.path).read_text()).text
    assert "No table has been validated yet." in text
    write_metrics(run, iterations=12)
    run.versions.unlink()
    write_samples(run, ["one", "two"])
    (run.samples / "heun-3" / "001.png").unlink()
    write_solver(run.distilled, [[0.5]] * 3, [[1.0]] * 3)
    text = Loads(write_report(run.path).read_text()).text
    for said in (
        "Best validation reward so far",
        "not been compared yet",
        "versions.json is not there yet",
        "distilled",
    ):
        assert said in text


def test_contact_sheet_shows_pictures_in_place(full: RunDirectory) -> None:
    sheet = contact_sheet(full.path, ["rdpo", "heun-3"], rows=2)
    assert sheet.size == (264 + 2 * 204 + 12, 110 + 2 * 204 + 12)
    with Image.open(full.samples / "heun-3" / "001.png", formats=["PNG"]) as picture:
        corner = np.array(picture.convert("RGB"))[2:12, 2:12].mean((0, 1))
    shown = np.array(sheet)[110 + 204 + 6 :, 264 + 12 + 204 + 6 :][:30, :30].mean((0, 1))
    np.testing.assert_allclose(shown, corner, atol=3)
    assert contact_sheet(full.path, ["rdpo"], rows=99).height == 110 + 6 * 204 + 12


def test_unusable_files_are_named(full: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunDirectoryError, match="no folder 'nothing'"):
        contact_sheet(full.path, ["nothing"], rows=1)
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    run.evaluation.write_text('{"split": "test"}')
    with pytest.raises(RunDirectoryError, match=r"evaluation\.json.*prompts"):
        write_report(run.path)
    write_evaluation(run)
    write_samples(run, ["one"])
    (run.samples / "rdpo" / "000.png").write_bytes(b"not a picture")
    with pytest.raises(RunDirectoryError, match=r"000\.png"):
        write_report(run.path)


def test_the_grid_begins_with_the_reference_and_the_best_rivals_at_equal_cost(full: RunDirectory) -> None:
    labels = re.findall(r'<div class="label[^>]*>([^<]*)<span>([^<]*)', full.report.read_text())
    assert labels[:5] == [
        ("EPD + RDPO (ours)", "parallel NFE 6 · 9 evaluations · 18 network passes"),
        ("EPD, distilled", "parallel NFE 6 · 9 evaluations · 18 network passes"),
        ("Euler", "parallel NFE 50 · 50 evaluations · 100 network passes"),
        ("iPNDM", "parallel NFE 6 · 6 evaluations · 12 network passes"),
        ("Euler", "parallel NFE 9 · 9 evaluations · 18 network passes"),
    ]
    assert len(labels) == len(SOLVERS)


def test_every_picture_and_drawing_has_a_text(full: RunDirectory) -> None:
    page = full.report.read_text()
    for tag, name in (("img", "alt"), ("figure", "aria-label")):
        found = re.findall(rf"<{tag}\b[^>]*>", page)
        assert found and all(re.search(rf'{name}="[^"]+"', one) for one in found)


def test_colours_can_be_read(full: RunDirectory) -> None:
    """Text has a contrast of 4.5 to 1 with the paper, in both themes (WCAG AA)."""
    page = full.report.read_text()
    themes = re.findall(r"--paper: (.{7}); --ink: (.{7}); --muted: (.{7});.*?--accent: (.{7})", page)
    assert len(themes) == 2

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for paper, *inks in themes:
        for ink in inks:
            low, high = sorted((luminance(paper), luminance(ink)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (paper, ink)


def texts_of(figure: Any) -> list[Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    ticks = [label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label)]
    shown = [text for text in (*texts, *ticks) if text.get_visible() and text.get_text()]
    return [text.get_window_extent() for text in shown]


def costs(nfe: int) -> dict[str, int]:
    return {"network passes": 2 * nfe, "evaluations": nfe, "parallel NFE": nfe}


def test_each_cost_has_a_panel_in_which_a_band_follows_its_line() -> None:
    points = [Measured(costs(nfe), 0.1 * nfe, 0.1 * nfe - 0.05, 0.1 * nfe + 0.02) for nfe in (6, 4, 8)]
    with rc_context(STYLE):
        panels = cost_curve({"Euler": points, "ours": points[:1]}, {"ours"}, "clip").axes
    assert [axes.get_xlabel() for axes in panels] == ["network passes", "evaluations", "parallel NFE"]
    for axes, factor in zip(panels, (2, 1, 1), strict=True):
        (line, alone), (band, bar) = axes.lines, axes.collections
        assert line.get_xdata().tolist() == [4 * factor, 6 * factor, 8 * factor]
        assert line.get_ydata() == pytest.approx([0.4, 0.6, 0.8])
        assert band.get_datalim(axes.transData).extents == pytest.approx([4 * factor, 0.35, 8 * factor, 0.82])
        assert alone.get_xdata().tolist() == [6 * factor] and alone.get_color() == "#c2410c"
        assert np.array(bar.get_segments()) == pytest.approx(np.array([[[6 * factor, 0.55], [6 * factor, 0.62]]]))


def test_numbers_in_drawings_do_not_overlap(full: RunDirectory) -> None:
    close = SolverTable(torch.tensor([[0.0, 0.02, 0.05], [0.0, 0.5, 0.54]]), torch.tensor([[0.2, 0.3, 0.5]] * 2))
    tables = {key: Solver(close, torch.tensor([1.0, 0.5, 0.01]), "flow") for key in ("rdpo", "distilled")}
    points = [Measured(costs(nfe), 0.5, 0.4, 0.6) for nfe in (4, 5, 6, 7, 8, 9, 10, 50)]
    names = {"a solver with quite a long name": points, "ours": points[:1]}
    sigmas = {name: [1.0, 0.9, 0.1, 0.0] for name in names}
    with rc_context(STYLE):
        figures = (
            solver_drawing(tables, "rdpo"),
            cost_curve(names, {"ours"}, "clip"),
            sigma_drawing(sigmas, {}, {"ours"}),
        )
    for figure in figures:
        boxes = texts_of(figure)
        assert len(boxes) > 3
        assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]
