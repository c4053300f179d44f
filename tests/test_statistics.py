import math
import warnings

import numpy as np
import pytest
from scipy import stats

from epd_ray.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    interval_over,
    mean_over_seeds,
    median_interval,
    paired_difference,
    student_mean,
)


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


SHARES = [(1.0, 1.0, 1.0), (1.0, 0.0, 0.1), (0.1, 1.0, 0.3), (0.0, 1.0, 0.3), (0.0, 0.0, 1.0)]


@pytest.mark.parametrize("same_prompts", [True, False])
@pytest.mark.parametrize("seeds", [3, 10])
def test_an_interval_over_seeds_covers_whatever_varies(seeds: int, same_prompts: bool) -> None:
    """The spreads of seeds, prompts and the rest are known; few seeds and alike ones are the hard cases."""
    rng, count, prompts = np.random.default_rng(0), 120, 32
    for of_seeds, of_prompts, of_rest in SHARES:
        shape = (count, 1 if same_prompts else seeds, prompts)
        values = of_seeds * rng.normal(size=(count, seeds, 1)) + of_prompts * rng.normal(size=shape)
        values = values + of_rest * rng.normal(size=(count, seeds, prompts)) + 3
        found = [mean_over_seeds(table, same_prompts=same_prompts) for table in values]
        covered = sum(interval.low <= 3 <= interval.high for interval in found) / count
        assert 0.9 <= covered <= 0.995, (of_seeds, of_prompts, of_rest)


def test_an_interval_over_seeds_is_wider_than_that_over_prompts() -> None:
    prompts = np.random.default_rng(4).normal(size=64)
    alike, apart = np.tile(prompts, (5, 1)), np.add.outer([-0.4, -0.2, 0.0, 0.2, 0.4], prompts)
    one, five, far = bootstrap_mean(prompts), *(mean_over_seeds(v, same_prompts=True) for v in (alike, apart))
    student = stats.ttest_1samp(prompts, 0.0).confidence_interval()
    assert (five.mean, five.low, five.high) == pytest.approx((prompts.mean(), student.low, student.high))
    assert far.mean == pytest.approx(five.mean) and far.high - far.low > 1.4 * (one.high - one.low)


def test_an_interval_over_seeds_has_the_known_values_at_its_ends() -> None:
    values = np.random.default_rng(5).normal(size=(4, 16))
    assert mean_over_seeds(values[:1], same_prompts=True) == bootstrap_mean(values[0])
    assert [interval_over(n) for n in (1, 2)] == ["prompts", "seeds and prompts"]
    assert mean_over_seeds(values, same_prompts=False) == student_mean(values.mean(1))
    constant = np.repeat(values[:, :1], 16, 1)  # only the seeds differ
    by_seed = student_mean(values[:, 0])
    for found in (mean_over_seeds(constant, same_prompts=True), mean_over_seeds(values[:, :1], same_prompts=True)):
        assert (found.mean, found.low, found.high) == pytest.approx((by_seed.mean, by_seed.low, by_seed.high))
    assert mean_over_seeds(np.full((3, 5), 0.25), same_prompts=True) == Interval(0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match=r"shape \[4\], expected \[seeds, prompts\]"):
        mean_over_seeds(values[:, 0], same_prompts=True)
    with pytest.raises(ValueError, match="1 that are not finite"):
        mean_over_seeds([[1.0, math.nan], [1.0, 1.0]], same_prompts=False)


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
