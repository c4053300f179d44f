"""Scores pictures with one head and checks the result; normalises and mixes the scores of several heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epd_ray.errors import RewardError, is_own_bug
from epd_ray.types import FloatArray, ImageArray, RewardHead


class Scorer:
    """Calls a reward head and checks that its scores are finite and complete.

    Args:
        name: name of the head in this run, for error messages.
        head: the reward head.
    """

    def __init__(self, name: str, head: RewardHead) -> None:
        self.name, self.head = name, head

    def score(self, images: ImageArray, prompts: Sequence[str], rollout_ids: Sequence[str]) -> FloatArray:
        """The head's raw scores [B], float32.

        Args:
            images: [B, 3, H, W], uint8.
            prompts: B texts.
            rollout_ids: B ids, for error messages.

        Raises:
            RewardError: the head failed, or returned another number of scores, or a score that is not finite.
        """
        return self.score_pictures(torch.from_numpy(np.array(images)).float() / 255, prompts, rollout_ids)

    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], rollout_ids: Sequence[str]) -> FloatArray:
        """As `score`, of pictures [B, 3, H, W], float32 in [0, 1]."""
        try:
            values = torch.as_tensor(self.head.score(pictures, list(prompts))).detach().float().cpu().numpy()
        except RewardError as error:  # the head itself says what is wrong; add its name in the run, and the ids
            raise RewardError(self.name, _one_line(f"{error.head} {error.problem}"), rollout_ids) from error
        except Exception as error:
            if is_own_bug(error):
                raise
            problem = _one_line(f"failed with {type(error).__name__}: {error}")
            raise RewardError(self.name, problem, rollout_ids) from error
        if values.shape != (len(rollout_ids),):
            raise RewardError(self.name, f"gave shape {values.shape} for {len(rollout_ids)} images", rollout_ids)
        wrong = [i for i, v in zip(rollout_ids, values, strict=True) if not np.isfinite(v)]
        if wrong:
            raise RewardError(self.name, f"gave {len(wrong)} values that are not finite", wrong)
        return np.asarray(values, np.float32)


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Normalisation:
    """Normalises a head's raw score x to clip((x + shift) / scale, low, high).

    A bound that is None does not limit the result; `scale` is not 0.
    """

    shift: float = 0.0
    scale: float = 1.0
    low: float | None = None
    high: float | None = None

    def __call__(self, values: FloatArray) -> FloatArray:
        return np.asarray(np.clip((values + self.shift) / self.scale, self.low, self.high), np.float32)


REFERENCE = {
    "hpsv2.1": Normalisation(low=0.0, high=1.0),
    "pickscore": Normalisation(scale=26.0, low=0.0, high=1.0),
    "imagereward": Normalisation(shift=3.1, scale=10.0, low=0.0, high=1.0),
    "clip": Normalisation(low=0.0, high=1.0),
    "aesthetic": Normalisation(scale=10.0, low=0.0, high=1.0),
}
"""The normalisations of the reference implementation, by registry name of the head; they fit scores of the published
packages. Source: RDPO (arXiv 2512.22796)."""


def standardise(values: FloatArray) -> Normalisation:
    """The z-score normalisation with mean and standard deviation of `values`; scores that are all equal become 0.

    Args:
        values: [B], raw scores of one head; B >= 1.
    """
    wide = values.astype(np.float64)
    return Normalisation(shift=-float(wide.mean()), scale=float(wide.std()) or 1.0)


def mix(
    scores: Mapping[str, FloatArray], weights: Mapping[str, float], normalisations: Mapping[str, Normalisation]
) -> FloatArray:
    """The weighted mean of the normalised scores, float32 [B].

    Args:
        scores: maps each head to its raw scores [B].
        weights: maps each head to its weight, >= 0; their sum must be > 0.
        normalisations: maps heads to their normalisations; the scores of other heads stay raw.
    """
    total = sum(weights.values())
    unchanged = Normalisation()
    parts = [weights[name] / total * normalisations.get(name, unchanged)(values) for name, values in scores.items()]
    return np.asarray(np.sum(parts, axis=0), np.float32)
