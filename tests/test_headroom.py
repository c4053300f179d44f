"""The headroom of a model: what wins at each number of evaluations, its report, and what is refused."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from epd_ray.bench import headroom as module
from epd_ray.bench.cases import Options
from epd_ray.bench.headroom import Search, Subject, headroom, methods_with
from epd_ray.bench.headroom_report import REWARD, Measurement, Point, curves, ranked, table, verdict, write_report
from epd_ray.bench.runner import run
from epd_ray.config.loading import load_config
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.errors import ConfigError, PromptError
from epd_ray.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from epd_ray.evaluation.suites.measure import Features
from epd_ray.prompts.splits import PromptSplits
from epd_ray.solvers.rival import Rival
from epd_ray.types import Sampled
from tests.fakes import Colours, Quiet

SPLITS = PromptSplits(["t"], [f"validation {i}" for i in range(30)], [f"test {i}" for i in range(12)])


class Algo:
    """Actors whose pictures are best with the iPNDM method at guidance 3.5 on a shift of 3; counts test prompts."""

    facts = BackboneFacts("x", "x", "flow", (1.0, 0.1), 7.0, True, {}, shift=2.0)

    def __init__(self) -> None:
        self.tested: list[str] = []
        self.images = np.random.default_rng(0).integers(1, 256, (12, 3, 4, 4)).astype(np.uint8)

    def sample_each(self, drawings):
        return [self.sample_scored(*drawing) for drawing in drawings]

    def sample_scored(self, sampler, prompts, seeds, on_images=None):
        if on_images is not None:
            self.tested.append(sampler.kind)
            for first in range(0, len(prompts), 4):
                on_images(first, self.images[first : first + 4])
        shift = 2.0 if sampler.shift is None else sampler.shift
        value = (sampler.kind == "ipndm") - abs(np.log(sampler.guidance_scale / 3.5)) - 0.3 * abs(shift - 3)
        rewards = np.array([value + len(sampler.kind) / 100 + np.sin(seed) / 10 for seed in seeds], np.float32)
        return Sampled({"clip": rewards, "watched": -rewards}, rewards, 0.0)


def searched(evals: int, algo: Algo | None = None, features: Features | None = None) -> Measurement:
    config, quiet = load_config(None, []), Quiet()
    quiet.stage("measuring headroom", 1)
    return Search(config, SPLITS, algo or Algo(), features or Features(), evals, quiet).measured()


def test_the_best_method_and_settings_are_found() -> None:
    algo = Algo()
    found = searched(6, algo)
    best = Rival.parse(found.best.rival)
    assert best.method == "ipndm" and best.shift == 3.0 and best.guidance_scale == pytest.approx(3.5)
    assert found.best.network_passes == 12 and found.evals == 6 and len(found.best.scores[REWARD]) == 12
    assert algo.tested == [Rival.parse(point.rival).method for point in found.points] and len(found.points) == 3
    assert found.points[0].validation == max(point.validation for point in found.points)
    assert found.images < 800 and found.candidates > 40


def test_the_frechet_distance_of_the_test_pictures_is_measured() -> None:
    algo, reference = Algo(), FeatureStatistics.of(np.random.default_rng(1).normal(100, 9, (40, 3))).gaussian()
    found = searched(6, algo, Features(Colours(), reference))
    seen = FeatureStatistics.of(Colours().features(algo.images)).gaussian()
    assert found.best.frechet_distance == pytest.approx(frechet_distance(seen, reference), rel=1e-5)
    assert searched(6).best.frechet_distance is None


def test_a_head_counts_on_the_prompts_that_it_judges(tmp_path) -> None:
    class Routed(Algo):
        def sample_scored(self, sampler, prompts, seeds, on_images=None):
            found = super().sample_scored(sampler, prompts, seeds, on_images)
            found.scores["watched"][::3] = np.nan
            return found

    found = searched(6, Routed())
    values = found.best.scores["watched"]
    assert found == Measurement(**json.loads(json.dumps(asdict(found), allow_nan=False)))
    assert [value is None for value in values] == [True, False, False] * 4
    assert found.best.means["watched"].mean == pytest.approx(np.mean([value for value in values if value is not None]))
    lines = write_report([found], "mine", tmp_path)
    assert "A head counts on the prompts that it judges: watched on 8." in " ".join(lines)
    assert not {"nan", "None"} & set(" ".join(lines).split())


def test_methods_have_exactly_the_evaluations_that_are_asked_for() -> None:
    assert {"euler_no_zero", "heun", "dpm2", "dpmpp2m"} <= set(methods_with(6, "flow"))
    assert not {"heun", "dpm2"} & set(methods_with(3, "flow")) and "edm" in methods_with(3, "flow")


def measured(evals: int, reward: float, scale: float = 3.0, distance: float | None = None, spread: float = 0.01):
    noise = np.random.default_rng(evals).normal(0, spread, 64)
    scores = {REWARD: (reward + noise).tolist(), "clip": (reward + noise).tolist(), "watched": noise.tolist()}
    point = Point(f"euler_no_zero?guidance_scale={scale:g}", "Euler", scale, 2 * evals, reward, scores, distance)
    return Measurement(evals, 100, 20, [point])


ROOM = [measured(4, 0.7, distance=4.0), measured(8, 0.85, distance=2.0), measured(50, 0.9, distance=1.5)]


def test_a_model_with_room_passes() -> None:
    said = verdict(ROOM)
    assert said.startswith("passes: 4 evaluations are -0.199") and "half widths below" in said and "2.7 times" in said
    assert "NOT" not in said


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([measured(4, 0.899, spread=0.1), *ROOM[1:]], "NOT: 4 evaluations"),
        ([ROOM[0], measured(8, 0.9), ROOM[2]], r"NOT: 8 are"),
        ([measured(4, 0.7, 1.0, 4.0), *ROOM[1:]], "NOT: the best guidance is 1 at 4, 3 at 8, 3 at 50 evaluations"),
        ([measured(4, 0.7, distance=2.0), *ROOM[1:]], "NOT: the Frechet distance is 1.3 times"),
    ],
)
def test_a_model_without_room_does_not_pass(found: list[Measurement], says: str) -> None:
    said = verdict(found)
    assert said.startswith("does not pass: ") and says in said and said.count("NOT: ") == 1


def test_the_verdict_needs_its_numbers() -> None:
    assert verdict(ROOM[1:]).startswith("no verdict: it needs 4 evaluations below the reference")
    without = [measured(4, 0.7), measured(8, 0.85), measured(50, 0.9)]
    assert "was not measured (--reference)" in verdict(without) and verdict(without).startswith("passes")


def test_the_report_has_a_table_and_a_plot_for_each_metric(tmp_path) -> None:
    lines = write_report(ROOM, "mine", tmp_path / "new")
    text = (tmp_path / "new" / "headroom.md").read_text()
    head, _, first, *_ = [line for line in text.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in head.split("|")[1:-1]]
    assert names == ["evals", "passes", "method", "settings", "reward", "watched", "Frechet", "minus 50"]
    assert first.split("|")[1:5] == [" 4 ", " 8 ", " Euler ", " guidance scale 3 "]
    assert lines[-1] == verdict(ROOM) and text.rstrip().endswith(verdict(ROOM))
    assert {path.name for path in (tmp_path / "new").glob("*.png")} == {"headroom.png", "headroom_watched.png"}
    assert [[point.costs["network passes"] for point in line] for line in curves(ROOM, REWARD).values()] == [
        [8, 16, 100],
        [8, 16, 100],
    ]
    assert len(table(ROOM)) == 4


def test_equal_methods_count_once() -> None:
    a, b, c = (Rival(name) for name in ("deis", "deis3", "euler"))
    same = np.array([1.0, 2.0], np.float32)
    assert ranked({a: same, b: same.copy(), c: same - 1}) == [a, c]
    assert ranked({a: same[:1], c: same - 1}) == [c, a]  # on more prompts
    assert ranked({a: np.full(2, -np.inf, np.float32), c: same}) == [c]


def test_a_stopped_search_goes_on(tmp_path, monkeypatch) -> None:
    calls: list[int] = []

    class Counted(Search):
        def measured(self) -> Measurement:
            calls.append(self._evals)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return searched(self._evals)

    class Nothing:
        def __enter__(self):
            return Algo()

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(module, "Search", Counted)
    monkeypatch.setattr(module, "run_session", lambda *_: Nothing())
    monkeypatch.setattr(module, "algorithm", lambda *_, rows: Nothing())
    subject = Subject(load_config(None, ["prompts.validation=8", "prompts.test=8"]), (4, 8, 12))
    with pytest.raises(KeyboardInterrupt):
        module.measure(subject, tmp_path, Quiet())
    found = module.measure(subject, tmp_path, Quiet())
    assert calls == [4, 8, 8, 12] and [one.evals for one in found] == [4, 8, 12]
    again = json.loads((tmp_path / "headroom-4.json").read_text())["measured"]
    assert Measurement(**again).best.rival == found[0].best.rival


def test_what_is_refused_before_anything_is_measured(tmp_path) -> None:
    with pytest.raises(PromptError, match=r"90000 test prompts asked, \d+ scenes exist"):
        headroom(["prompts.test=90000"], folder=tmp_path)
    with pytest.raises(ConfigError, match="--evals is \\[4\\], at least two numbers"):
        headroom(evals=[4], folder=tmp_path)
    with pytest.raises(ConfigError, match="config given, but only headroom takes them"):
        run(["overhead"], Options(config=tmp_path / "x.yaml"))
    assert not list(tmp_path.iterdir())
