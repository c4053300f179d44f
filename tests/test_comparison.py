import json

import numpy as np
import pytest

from epd_ray.drawing.sampler import baseline
from epd_ray.evaluation.comparison import Comparison, Row, headline
from epd_ray.evaluation.records import Evaluation


@pytest.fixture
def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    rows = [Row(baseline("euler", n), {"clip": rng.normal(size=5).astype(np.float32)}, 0.1) for n in (4, 6)]
    return Comparison("test", tuple("abcde"), (1, 2, 3, 4, 5), tuple(rows), ("euler-6",))


def test_what_is_written_reads_back(comparison):
    text = json.dumps(comparison.summary())
    assert Evaluation.model_validate_json(text) == comparison.evaluation
    written = json.loads(text)
    assert list(written) == ["split", "prompts", "metrics", "solvers", "differences"]
    costs = ["intervals", "parallel_nfe", "model_evals", "seconds_per_image"]
    assert list(written["solvers"][0]) == ["key", "label", "kind", "schedule", *costs, "metrics"]
    assert list(written["solvers"][0]["metrics"]["clip"]) == ["mean", "low", "high"]
    assert list(written["differences"][0]) == ["metric", "solver", "against", "mean", "low", "high"]


def test_the_terminal_says_costs_and_scores(comparison):
    first, second = headline(json.loads(json.dumps(comparison.summary())))
    assert "parallel NFE  4,  4 evaluations" in first and "parallel NFE  6,  6 evaluations" in second
    assert f"clip {comparison.means['euler-4']['clip'].mean:.4f}" in first
