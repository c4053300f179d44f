"""What a reward actor does: score pictures, and refuse to answer with anything that is not a reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from epd_ray.errors import RewardError
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
        except Exception as error:
            raise RewardError(self.name, f"failed with {type(error).__name__}: {error}", rollout_ids) from error
        if values.shape != (len(rollout_ids),):
            raise RewardError(self.name, f"gave shape {values.shape} for {len(rollout_ids)} images", rollout_ids)
        wrong = [i for i, v in zip(rollout_ids, values, strict=True) if not np.isfinite(v)]
        if wrong:
            raise RewardError(self.name, f"gave {len(wrong)} values that are not finite", wrong)
        return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Normalisation:
    """How a head's raw value enters the mix: clip((x + shift) / scale, low, high)."""

    weight: float = 1.0
    shift: float = 0.0
    scale: float = 1.0
    low: float | None = None
    high: float | None = None

    def __call__(self, values: FloatArray) -> FloatArray:
        return np.asarray(np.clip((values + self.shift) / self.scale, self.low, self.high), np.float32)


def mix(scores: Mapping[str, FloatArray], heads: Mapping[str, Normalisation]) -> FloatArray:
    """The weighted mean of the normalised scores, float32 [B]."""
    total = sum(h.weight for h in heads.values())
    parts = [heads[name].weight / total * heads[name](values) for name, values in scores.items()]
    return np.asarray(np.sum(parts, axis=0), np.float32)
