import math
import warnings

import numpy as np
import pytest
from scipy import stats

from epd_ray.evaluation.statistics import Interval, bootstrap_mean, median_interval, paired_difference, student_mean


def test_interval_matches_the_normal_one_on_a_large_sample() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_interval_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    found = [bootstrap_mean(rng.normal(size=40)) for _ in range(100)]
    assert 88 <= sum(interval.low <= 0 <= interval.high for interval in found) <= 99


def test_a_mean_of_few_runs_has_students_interval() -> None:
    values = [0.021, 0.012, 0.016]
    interval = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert student_mean(values) == Interval(*(pytest.approx(v) for v in (np.mean(values), interval.low, interval.high)))
    assert student_mean([0.5]) == Interval(0.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="values are empty"):
        student_mean([])


def test_pairs_are_narrower_than_samples() -> None:
    rng = np.random.default_rng(2)
    prompt = rng.normal(0, 1, 100)
    a, b = prompt + 0.05 + rng.normal(0, 0.02, 100), prompt
    gain = paired_difference(a, b)
    assert 0.03 < gain.low < 0.05 < gain.high < 0.07
    assert bootstrap_mean(a).low < 0 < bootstrap_mean(a).high
    swapped = paired_difference(b, a)
    assert (swapped.mean, swapped.low) == pytest.approx((-gain.mean, -gain.high), abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 128])
def test_equal_values_have_zero_width(count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_mean([0.1] * count) == Interval(0.1, 0.1, 0.1)
        ramp = np.arange(count) / 7
        shifted = paired_difference(ramp + 0.3, ramp)
    np.testing.assert_allclose([shifted.mean, shifted.low, shifted.high], 0.3, rtol=1e-12)


def test_seed_decides() -> None:
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


@pytest.mark.parametrize(
    ("values", "said"),
    [([], "n >= 1"), ([[1.0, 2.0]], r"shape \[1, 2\]"), ([0.0, float("nan")], r"values\[1\] is nan")],
)
def test_wrong_values_are_named(values: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bootstrap_mean(values)


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="expected pairs"):
        paired_difference([1.0, 2.0], [1.0])


def test_the_median_of_five_lies_between_the_extremes() -> None:
    found = median_interval([64, 32, math.inf, 96, 128])
    assert (found.median, found.low, found.high) == (96, 32, math.inf)
    assert found.coverage == pytest.approx(1 - 2 / 2**5)


def test_many_values_narrow_the_median() -> None:
    values = np.arange(100)
    found = median_interval(values)
    assert (found.median, found.low, found.high) == (49.5, 39, 60)  # the 40th and 61st, as in tables of the sign test
    assert 0.95 <= found.coverage < 0.97
    medians = [median_interval(np.random.default_rng(i).exponential(size=12)) for i in range(400)]
    covered = np.mean([m.low <= np.log(2) <= m.high for m in medians])
    assert abs(covered - medians[0].coverage) < 0.03


def test_a_median_of_nothing_is_refused() -> None:
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="expected at least one and no NaN"):
            median_interval(values)
