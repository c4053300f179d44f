import json
from dataclasses import replace

import numpy as np
import pytest

from epd_ray.drawing.sampler import Sampler, baseline
from epd_ray.evaluation.comparison import Comparison, Row, opponents
from epd_ray.evaluation.records import Evaluation
from epd_ray.evaluation.verdict import closing, principal, rivals_at, small_table, verdicts
from epd_ray.evaluation.wording import duration, plain, wrapped
from epd_ray.solvers.table import uniform_table


@pytest.fixture
def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    rows = [Row(baseline("euler", n), {"clip": rng.normal(size=5).astype(np.float32)}, 0.1) for n in (4, 6)]
    more = {"ours": ("euler-6",), "reference": "euler-4", "guidance_scale": 7.0, "sigmas": {"euler-4": (1.0, 0.5)}}
    return Comparison("test", tuple("abcde"), (1, 2, 3, 4, 5), tuple(rows), **more)


def test_what_is_written_reads_back(comparison):
    text = json.dumps(comparison.summary())
    assert Evaluation.model_validate_json(text) == comparison.evaluation
    written = json.loads(text)
    assert list(written) == [
        *("split", "prompts", "metrics", "solvers", "differences", "ours", "reference", "guidance_scale")
    ]
    more = ["guidance_scale", "tuned"]
    costs = ["intervals", "parallel_nfe", "model_evals", "network_passes", "seconds_per_image"]
    assert list(written["solvers"][0]) == ["key", "label", "kind", "schedule", *costs, "metrics", "sigmas", *more]
    assert written["solvers"][0]["sigmas"] == [1.0, 0.5] and written["solvers"][1]["sigmas"] == []
    assert list(written["solvers"][0]["metrics"]["clip"]) == ["mean", "low", "high"]
    assert list(written["differences"][0]) == ["metric", "solver", "against", "mean", "low", "high"]


SEED = np.random.default_rng(1).normal(0, 0.05, 64)
LEVEL = {"rdpo": 0.8, "distilled": 0.7, "euler-50": 0.9, "euler-4": 0.5, "heun-4": 0.6, "euler-6": 0.75, "heun-6": 0.65}


def compared(ours: float = 0.8, second: float | None = None, *names: str) -> Evaluation:
    """A run's comparison: the mean of each solver is its LEVEL, and noise is the same for all but ours.

    Args:
        ours: the mean of the run's solver in the first metric.
        second: its mean in a second metric, in which all others have 0.5; None leaves the metric out.
        names: the solvers; all of LEVEL by default.
    """
    rows = []
    for key in names or LEVEL:
        mine, (kind, _, nfe) = key == "rdpo", key.partition("-")
        learned = Sampler("epd", 2, key, key, uniform_table(2, 3, start_point=True))  # parallel NFE 4, 6 evaluations
        sampler = replace(baseline(kind, int(nfe)), key=key, label=kind) if nfe else learned
        noise = SEED * (1.2 if mine else 1)
        values = {"clip": (ours if mine else LEVEL[key]) + noise}
        if second is not None:
            values["scene_accuracy"] = (second if mine else 0.5) + noise
        rows.append(Row(sampler, values, 0.004 * sampler.model_evals))
    prompts, seeds = tuple("p" * len(SEED)), tuple(range(len(SEED)))
    return Comparison(
        "test", prompts, seeds, tuple(rows), reference="euler-50", guidance_scale=7.0, classifier_free=True
    ).evaluation


def sentence(evaluation: Evaluation) -> str:
    (found,) = verdicts(evaluation)
    return found.sentence


def test_the_verdict_is_against_the_reference_and_the_best_rival_of_as_many_passes():
    (found,) = verdicts(compared())
    assert [one.other.key for one in found.against] == ["euler-50", "euler-6"]
    off = 0.2 * SEED.mean()
    assert [one.differences["clip"].mean for one in found.against] == pytest.approx([off - 0.1, off + 0.05])
    assert [one.speed.ratio for one in found.against] == pytest.approx([6 / 50, 1])
    costs = ("parallel NFE 4, 6 evaluations, 12 network passes", "2 rivals with 12 network passes")
    for part in ("64 prompts", "guidance scale 7", *costs, "24 ms per picture against 200 ms"):
        assert part in found.sentence


@pytest.mark.parametrize(
    ("ours", "reference", "rival"),
    [(0.95, "better than 50 steps", "better than the best of 2"), (0.8, "worse than 50 steps", "better than the best"),
     (0.75, "worse than 50 steps", "level with the best of 2"), (0.6, "worse than 50 steps", "worse than the best")],
)  # fmt: skip
def test_the_verdict_may_be_against_us(ours, reference, rival):
    said = sentence(compared(ours))
    assert reference in said and rival in said
    assert said.count("better than") == (reference + rival).count("better than")


def test_metrics_that_disagree_are_told_apart():
    said = sentence(compared(0.95, 0.5))
    assert "better than 50 steps of euler in clip (+" in said and "level with it in scene accuracy (" in said
    assert "points [" in said


def test_what_was_not_compared_is_not_spoken_of():
    assert "compared with no other" in sentence(compared(0.8, None, "rdpo"))
    assert "50 steps" not in sentence(compared(0.8, None, "rdpo", "euler-6"))
    only = sentence(compared(0.8, None, "rdpo", "euler-50", "euler-4"))
    assert "50 steps" in only and "rival" not in only
    nothing = compared()
    nothing.metrics = ["sharpness"]  # of which more is not better
    assert verdicts(nothing) == [] and principal(nothing)


def test_rivals_of_the_next_larger_cost_stand_in():
    evaluation = compared(0.8, None, "rdpo", "euler-50", "heun-6", "euler-4")
    ours = evaluation.solver("rdpo")
    ours.network_passes = 11
    assert [row.key for row in rivals_at(evaluation, ours, evaluation.equal_cost)] == ["heun-6"]
    ours.network_passes = 13
    assert rivals_at(evaluation, ours, evaluation.equal_cost) == []  # the reference is no rival at a lower cost


def test_equal_cost_means_equal_passes_where_they_are_known():
    """A solver without guidance has two evaluations for the passes of one with guidance."""
    evaluation = compared(0.8, None, "rdpo", "euler-6", "heun-6", "euler-50")
    evaluation.solver("heun-6").network_passes = 6  # as without guidance
    evaluation.solver("euler-50").network_passes = 12
    ours = evaluation.solver("rdpo")
    assert {row.key for row in rivals_at(evaluation, ours, evaluation.equal_cost)} == {"euler-6", "euler-50"}
    for row in evaluation.solvers:
        row.network_passes = None  # an evaluation.json of an earlier version
    assert {row.key for row in rivals_at(evaluation, ours, evaluation.equal_cost)} == {"euler-6", "heun-6"}
    assert "6 evaluations) is" in sentence(evaluation) and "of 2 rivals with 6 evaluations" in sentence(evaluation)
    assert small_table(evaluation)[1][1:4] == ["4", "6", "-"]


def test_the_table_has_the_solvers_that_matter_in_aligned_columns():
    evaluation = compared(0.8, 0.5)
    assert [row.key for row in principal(evaluation)] == ["rdpo", "distilled", "euler-50", "heun-4", "euler-6"]
    rows = small_table(evaluation)
    costs = [["4", "6", "12"], ["4", "6", "12"], ["50", "50", "100"], ["4", "4", "8"], ["6", "6", "12"]]
    assert [row[1:4] for row in rows[1:]] == costs
    accuracy = evaluation.solvers[0].metrics["scene_accuracy"].mean
    assert rows[3][-1] == "200 ms" and rows[1][5].startswith(f"{100 * accuracy:.1f} % [")
    lines = closing(evaluation)
    assert max(map(len, lines)) <= 100
    assert any("2 other solvers" in line for line in lines)


def test_lines_break_between_words_but_not_within_an_interval():
    assert wrapped("clip -0.032 [-0.052, -0.015] is", 24) == "clip -0.032\n[-0.052, -0.015] is"


def test_columns_align():
    rows = [["name", "much\nhigher", "words"], ["a\nb", "9", "x y"], ["long name", "-10", "z"]]
    assert plain(rows) == [
        "             much",
        "name       higher  words",
        "a               9  x y",
        "b",
        "long name     -10  z",
    ]


def test_the_reference_is_drawn_once():
    found = opponents(["euler", "heun"], baseline("euler", 50), equal_evals=True)
    assert [sampler.key for sampler in found] == ["euler-50", "heun-50"]


def test_the_time_of_a_picture_is_written_at_its_size() -> None:
    written = [duration(s) for s in (None, 0.01234, 0.9994, 0.9996, 1.234, 100.4, 999.4, 1000.2, 7300.0)]
    assert written == ["-", "12.3 ms", "999 ms", "1 s", "1.23 s", "100 s", "999 s", "16 min 40 s", "2 h 1 min"]
