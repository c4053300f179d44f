"""Means, paired differences and medians, each with an interval that says how uncertain it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from epd_ray.randomness import Purpose, stream

Values = Sequence[float] | npt.NDArray[np.floating]

RESAMPLES = 9999
HELD = 10**7  # the number of resampled values in memory at a time, which take 80 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, which is one of 95 % unless stated otherwise.

    Attributes:
        mean: the mean.
        low: the lower end of the interval; NaN if the interval is not known.
        high: the upper end of the interval; NaN if the interval is not known.
    """

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the interval is known."""
        return not (math.isnan(self.low) or math.isnan(self.high))


def bootstrap_mean(values: Values, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Compute the mean of a sample with the interval of the percentile bootstrap.

    Args:
        values: [n], finite, n >= 1, from units that are independent of each other (prompts, not pictures of one
            prompt).
        seed: the seed of the resampling; the same values and seed give the same interval.
        confidence: the confidence level of the interval, above 0 and below 1.

    Returns:
        The mean and its interval. The interval has zero width if all values are equal, and so also for a single value,
        which tells nothing about the spread.

    Raises:
        ValueError: there are no values, they have more than one dimension, or one of them is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"values has shape {list(sample.shape)}, expected [n] with n >= 1")
    if not np.isfinite(sample).all():
        index = int(np.flatnonzero(~np.isfinite(sample))[0])
        raise ValueError(f"values[{index}] is {sample[index]}, expected a finite number")
    if np.ptp(sample) == 0:
        return Interval(*[float(sample[0])] * 3)
    rng = stream(Purpose.BOOTSTRAP, seed)
    batch = min(1000, max(1, HELD // sample.size))
    found = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=batch,
        confidence_level=confidence,
        method="percentile",
        rng=rng,
    )
    return Interval(float(sample.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high))


def judged(values: Values) -> npt.NDArray[np.float64]:
    """The scores of the prompts that a head judges; those of other prompts are NaN."""
    scores = np.asarray(values, dtype=np.float64)
    return scores[~np.isnan(scores)]


def student_mean(values: Values, *, confidence: float = 0.95) -> Interval:
    """Compute the mean of a few independent runs with Student's interval, because a bootstrap interval is too narrow.

    Args:
        values: [n], finite, n >= 1.
        confidence: the confidence level of the interval, above 0 and below 1.

    Returns:
        The mean and its interval, which is infinitely wide for a single value.

    Raises:
        ValueError: there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("values are empty, expected at least one")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + confidence) / 2, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size))
    return Interval(mean, mean - half, mean + half)


def mean_over_seeds(values: Values, *, same_prompts: bool, confidence: float = 0.95) -> Interval:
    """Compute the mean of a few runs with an interval for other seeds and other prompts together.

    Seeds and prompts are random effects: a value is a mean, plus what its seed adds, plus what its prompt adds, plus
    the rest. Their variances add up to that of the mean, and Student's distribution has the degrees of freedom of
    this sum. A bootstrap that draws seeds and then prompts is not used: with 3 seeds of unlike means its interval of
    95 % covers less than 80 %, and with 10 seeds of like means nearly everything, because it counts the rest again.

    Args:
        values: [S, P], finite, P >= 1: a row for each seed.
        same_prompts: whether all rows have the same prompts in the same order; False where each has its own.
        confidence: the confidence level of the interval, above 0 and below 1.

    Returns:
        The mean and its interval. A single seed says nothing about others: the interval is then `bootstrap_mean` over
        the prompts, which `interval_over` says.

    Raises:
        ValueError: the values have another shape, or one of them is not finite.

    Source: Satterthwaite, Biometrics Bulletin 2 (1946); for random effects Searle et al., Variance Components (1992).
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"values has shape {list(table.shape)}, expected [seeds, prompts] with at least one of each")
    if not np.isfinite(table).all():
        raise ValueError(f"values has {np.count_nonzero(~np.isfinite(table))} that are not finite, expected none")
    seeds, prompts = table.shape
    if seeds == 1:
        return bootstrap_mean(table[0], confidence=confidence)
    by_seed = table.mean(1)
    if not same_prompts or prompts == 1:  # what a seed's mean says of its own prompts is in the spread of the means
        return student_mean(by_seed, confidence=confidence)
    mean, by_prompt = table.mean(), table.mean(0)
    rest = table - by_seed[:, None] - by_prompt + mean
    freedom = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    squares = np.array([prompts * by_seed.var(ddof=1), seeds * by_prompt.var(ddof=1), (rest**2).sum() / freedom[2]])
    total = max(squares[0] + squares[1] - squares[2], *squares[:2])  # the expected value of the first, whatever drawn
    if total == 0:
        return Interval(*[float(mean)] * 3)
    half = stats.t.ppf((1 + confidence) / 2, total**2 / (squares**2 / freedom).sum())
    half *= math.sqrt(total / table.size)
    return Interval(float(mean), float(mean - half), float(mean + half))


def interval_over(seeds: int) -> str:
    """What the interval of `mean_over_seeds` is over, for people."""
    return "prompts" if seeds == 1 else "seeds and prompts"


def paired_difference(a: Values, b: Values, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Compute the mean of a - b over pairs with its bootstrap interval.

    Args:
        a: [n], finite, or NaN where the prompt was not judged.
        b: [n], the same; b[i] was measured on the same prompt and seed as a[i].
        seed: the seed of the resampling.
        confidence: the confidence level of the interval, above 0 and below 1.

    Raises:
        ValueError: a and b have different shapes, or values that `bootstrap_mean` refuses.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {list(first.shape)} and b {list(second.shape)}, expected pairs")
    pairs = ~(np.isnan(first) & np.isnan(second))
    return bootstrap_mean((first - second)[pairs], seed=seed, confidence=confidence)


@dataclass(frozen=True)
class MedianInterval:
    """A median with an interval between two of the values.

    Attributes:
        median: the median; infinite if half of the values are.
        low: the value at the lower end of the interval.
        high: the value at the upper end of the interval.
        coverage: the probability that an interval made this way contains the true median, whatever the distribution.
    """

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Values) -> MedianInterval:
    """Compute the median with its interval by order statistics.

    Args:
        values: [n], n >= 1. Infinite values, which stand for "never reached", count as larger than all others.

    Returns:
        The median with the narrowest such interval that covers at least 95 %; with too few values it is their whole
        range, which covers less.

    Raises:
        ValueError: there are no values, they have more than one dimension, or one of them is NaN.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.ndim != 1 or ordered.size == 0 or np.isnan(ordered).any():
        raise ValueError(f"values are {list(values)}, expected at least one and no NaN")
    n = ordered.size
    tails = stats.binom.cdf(np.arange(n), n, 0.5)  # the probability of at most i values below the median
    cut = int(max(0, (tails <= 0.025).sum() - 1))
    middle = ordered[(n - 1) // 2 : n // 2 + 1]
    return MedianInterval(
        float(middle.mean()), float(ordered[cut]), float(ordered[n - 1 - cut]), float(1 - 2 * tails[cut])
    )
