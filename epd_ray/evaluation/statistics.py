"""Means with an honest interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from epd_ray.randomness import Purpose, stream

Values = Sequence[float] | npt.NDArray[np.floating]

RESAMPLES = 9999
HELD = 10**7  # resampled values at a time: 80 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, of 95 % unless said otherwise; ends that are NaN are not known."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is more than the mean."""
        return not (math.isnan(self.low) or math.isnan(self.high))


def bootstrap_mean(values: Values, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """The mean of a sample, with the percentile bootstrap's interval.

    Args:
        values: [n], finite, n >= 1; the units that were drawn independently (prompts, not pictures of one prompt).
        seed: of the resampling; the same values and seed give the same interval.
        confidence: of the interval, in (0, 1).

    Returns:
        Zero width where all values are equal, and so also for a single value, which says nothing about spread.

    Raises:
        ValueError: no values, more than one dimension, or a value that is not finite.
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


def student_mean(values: Values, *, confidence: float = 0.95) -> Interval:
    """The mean of a few independent runs, with Student's interval; a bootstrap of so few is too narrow.

    Args:
        values: [n], finite, n >= 1.
        confidence: of the interval, in (0, 1).

    Returns:
        Infinite width for a single value.

    Raises:
        ValueError: no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("values are empty, expected at least one")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + confidence) / 2, sample.size - 1) * stats.sem(sample))
    return Interval(mean, mean - half, mean + half)


def paired_difference(a: Values, b: Values, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """The mean of a - b over pairs, with its interval.

    Args:
        a: [n], finite.
        b: [n], finite; b[i] was measured on the same prompt and seed as a[i].
        seed: of the resampling.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: different shapes, or values that `bootstrap_mean` refuses.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {list(first.shape)} and b {list(second.shape)}, expected pairs")
    return bootstrap_mean(first - second, seed=seed, confidence=confidence)


@dataclass(frozen=True)
class MedianInterval:
    """A median between two of the values that it was taken of.

    Attributes:
        median: infinite where half of the values are.
        low: a value.
        high: a value.
        coverage: how often such an interval holds the population's median, whatever the distribution.
    """

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Values) -> MedianInterval:
    """The median with its interval by order statistics: at least 95 %, or the whole range where that is less.

    Args:
        values: [n], n >= 1; infinite ones (never reached) count as larger than all others.

    Raises:
        ValueError: no values, more than one dimension, or one that is not a number.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.ndim != 1 or ordered.size == 0 or np.isnan(ordered).any():
        raise ValueError(f"values are {list(values)}, expected at least one and no NaN")
    n = ordered.size
    tails = stats.binom.cdf(np.arange(n), n, 0.5)  # chance of at most i values below the median
    cut = int(max(0, (tails <= 0.025).sum() - 1))
    middle = ordered[(n - 1) // 2 : n // 2 + 1]
    return MedianInterval(
        float(middle.mean()), float(ordered[cut]), float(ordered[n - 1 - cut]), float(1 - 2 * tails[cut])
    )
