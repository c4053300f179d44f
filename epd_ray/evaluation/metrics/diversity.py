"""Diversity: how different the pictures of one prompt are, which falls when a policy hacks its reward."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epd_ray.errors import MetricError, shown
from epd_ray.evaluation.metrics.checks import checked_features


def diversity(features: npt.NDArray[np.generic], prompts: Sequence[str]) -> dict[str, float]:
    """Compute for each prompt the mean of 1 - cosine over all pairs of its pictures' features.

    Args:
        features: [B, D], the features of pictures that were drawn from different noise.
        prompts: B prompts (or their ids), one for each row, in any order.

    Returns:
        Prompt -> its diversity from 0 (all pictures are alike) to 2, in the order in which prompts first appear.

    Raises:
        MetricError: a prompt has a single picture, there are not as many prompts as rows, or features are not finite
            or all 0.
    """
    rows = checked_features(features)
    if len(rows) != len(prompts):
        raise MetricError(f"{len(rows)} rows of features and {len(prompts)} prompts, expected one prompt a row")
    lengths = np.linalg.norm(rows, axis=1)
    if not lengths.all():
        raise MetricError(f"features[{int(lengths.argmin())}] are all 0, which has no direction: check the extractor")
    rows /= lengths[:, None]
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(index)
    alone = [prompt for prompt, members in found.items() if len(members) < 2]
    if alone:
        raise MetricError(
            f"diversity: prompt {shown(alone[0])} has 1 picture, expected at least 2 of each prompt "
            f"({len(alone)} prompts have 1: draw every prompt from several seeds)"
        )
    return {prompt: _mean_distance(rows[members]) for prompt, members in found.items()}


def _mean_distance(rows: npt.NDArray[np.float64]) -> float:
    """The mean of 1 - cosine over pairs of unit rows [n, D], by |sum of rows|^2 = n + 2 * (sum of all cosines)."""
    n = len(rows)
    cosines = (np.square(rows.sum(axis=0)).sum() - n) / (n * (n - 1))
    return float(np.clip(1 - cosines, 0, 2))  # rounding gives -1e-16 for equal pictures
