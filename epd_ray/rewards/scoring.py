"""What a reward actor does: score pictures, and refuse to answer with anything that is not a reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from epd_ray.errors import RewardError, is_own_bug
from epd_ray.types import FloatArray, ImageArray, RewardHead


class Scorer:
    """One head behind its checks.

    Args:
        name: of the head in this run.
        head: the model.
    """

    def __init__(self, name: str, head: RewardHead) -> None:
        self.name, self.head = name, head

    def score(self, images: ImageArray, prompts: Sequence[str], rollout_ids: Sequence[str]) -> FloatArray:
        """Raw scores [B] of images [B, 3, H, W], uint8.

        Raises:
            RewardError: the head failed, gave another count, or a value that is not finite; with the rollout ids.
        """
        pictures = torch.from_numpy(np.array(images)).float() / 255
        try:
            values = torch.as_tensor(self.head.score(pictures, list(prompts))).detach().float().cpu().numpy()
        except RewardError as error:  # a head that says itself what is wrong
            raise RewardError(self.name, _line(error.problem), rollout_ids) from error
        except Exception as error:
            if is_own_bug(error):
                raise
            said = _line(f"failed with {type(error).__name__}: {error}")
            raise RewardError(self.name, said, rollout_ids) from error
        if values.shape != (len(rollout_ids),):
            raise RewardError(self.name, f"gave shape {values.shape} for {len(rollout_ids)} images", rollout_ids)
        wrong = [i for i, v in zip(rollout_ids, values, strict=True) if not np.isfinite(v)]
        if wrong:
            raise RewardError(self.name, f"gave {len(wrong)} values that are not finite", wrong)
        return np.asarray(values, np.float32)


def _line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Normalisation:
    """How a head's raw value enters the mix: clip((x + shift) / scale, low, high)."""

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
"""The reference's clamps, by registry name, on the published packages' values. Source: RDPO (arXiv 2512.22796)."""


def standardise(values: FloatArray) -> Normalisation:
    """The z-score over values [B]; a head that gives one value for everything counts for nothing.

    Args:
        values: raw scores of one head, at least one.
    """
    wide = values.astype(np.float64)
    return Normalisation(shift=-float(wide.mean()), scale=float(wide.std()) or 1.0)


def mix(
    scores: Mapping[str, FloatArray], weights: Mapping[str, float], normalisations: Mapping[str, Normalisation]
) -> FloatArray:
    """The weighted mean of the normalised scores, float32 [B].

    Args:
        scores: head -> raw values [B].
        weights: head -> share, >= 0, not all 0.
        normalisations: by head; raw values where there is none.
    """
    total = sum(weights.values())
    as_it_is = Normalisation()
    parts = [weights[name] / total * normalisations.get(name, as_it_is)(values) for name, values in scores.items()]
    return np.asarray(np.sum(parts, axis=0), np.float32)
