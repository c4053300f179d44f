"""The Frechet distance between two sets of features, from statistics that can be merged over shards."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt
from scipy import linalg

from epd_ray.errors import MetricError
from epd_ray.evaluation.metrics.checks import Array, checked_features


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that the Frechet distance takes in place of a set of features.

    Attributes:
        mean: [D], float64.
        covariance: [D, D], float64, with the divisor n - 1.
        count: n, the number of pictures; None if a published file does not say it.
    """

    mean: Array
    covariance: Array
    count: int | None = None


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean and scatter of features. Merging those of the parts gives those of the whole set.

    Attributes:
        count: n, the number of pictures, at least 1.
        mean: [D], float64.
        scatter: [D, D], float64, the sum of (f - mean)(f - mean)^T over all features f.
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: npt.NDArray[np.generic]) -> "FeatureStatistics":
        """Compute the statistics of one shard's features [B, D].

        Raises:
            MetricError: the features are not [B, D], or not finite.
        """
        rows = checked_features(features)
        mean = rows.mean(axis=0)
        rows -= mean
        return cls(len(rows), mean, rows.T @ rows)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Compute the statistics of both sets together.

        Raises:
            MetricError: the sets have different numbers of features.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
        """
        if self.mean.shape != other.mean.shape:
            sizes = f"{len(self.mean)} and {len(other.mean)}"
            raise MetricError(f"statistics of {sizes} features do not merge: use one extractor for all shards")
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step, step) * (self.count * other.count / count)
        return FeatureStatistics(count, self.mean + step * (other.count / count), scatter)

    @staticmethod
    def merged(parts: Iterable["FeatureStatistics"]) -> "FeatureStatistics":
        """Compute the statistics of all parts together; there is at least one part."""
        return reduce(FeatureStatistics.merge, parts)

    def gaussian(self) -> Gaussian:
        """The mean and the covariance, which is all 0 for a single picture."""
        return Gaussian(self.mean, self.scatter / max(self.count - 1, 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The distance falls as the number of pictures grows, even between sets of one distribution, so it may be compared
    only between equal numbers of pictures.

    Returns:
        A number of at least 0. It is the FID if the features are Inception's (see metrics.inception).

    Raises:
        MetricError: the sets have different numbers of features, or too few pictures for a regular covariance.

    Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6. With C_a = R R^T, the product C_a C_b has the eigenvalues of
    the symmetric R^T C_b R, whose roots add up to the trace with no imaginary parts.
    """
    size = len(a.mean)
    if len(b.mean) != size:
        raise MetricError(
            f"Frechet distance between {size} and {len(b.mean)} features: take both sets from the same extractor"
        )
    for count in (a.count, b.count):
        if count is not None and count <= size:
            raise MetricError(
                f"Frechet distance: {count} pictures, expected at least {size + 1} for {size} features "
                "(draw more, or use an extractor with fewer features)"
            )
    values, vectors = linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(min=0))  # R
    shared = linalg.eigvalsh(root.T @ b.covariance @ root)
    step = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(shared.clip(min=0)).sum()
    return max(float(step @ step + traces), 0.0)
