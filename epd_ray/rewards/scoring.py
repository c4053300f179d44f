"""Scores pictures with one head and checks the result; normalises and mixes the scores of several heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epd_ray.errors import RewardError, is_own_bug
from epd_ray.rewards.needs import missing, needed_by
from epd_ray.types import Costly, FloatArray, ImageArray, Metadata, ReadsRows, RewardHead

Weights = float | npt.NDArray[np.float64]


class Scorer:
    """Calls a reward head and checks that its scores are finite and complete.

    Args:
        name: name of the head in this run, for error messages.
        head: the reward head.
    """

    def __init__(self, name: str, head: RewardHead) -> None:
        self.name, self.head = name, head

    @property
    def costs(self) -> Mapping[str, int]:
        """What the head has cost so far by name; empty where it does not count that."""
        return dict(self.head.costs) if isinstance(self.head, Costly) else {}

    def score(
        self,
        images: ImageArray,
        prompts: Sequence[str],
        rollout_ids: Sequence[str],
        rows: Sequence[Metadata | None] | None = None,
    ) -> FloatArray:
        """The head's raw scores [B], float32; NaN where it does not judge the row.

        Args:
            images: [B, 3, H, W], uint8.
            prompts: B texts.
            rollout_ids: B ids, for error messages.
            rows: the columns of each prompt's row that the head reads, and None for a row that it does not judge; None
                where it judges all of them and reads none.

        Raises:
            RewardError: the head failed, or returned another number of scores, or a score that is not finite; or a row
                lacks a column that it reads.
        """
        if rows is None or None not in rows:
            return self.score_pictures(_floats(images), prompts, rollout_ids, rows)
        values = np.full(len(rows), np.nan, np.float32)
        if judged := [i for i, row in enumerate(rows) if row is not None]:
            texts, ids = ([values[i] for i in judged] for values in (prompts, rollout_ids))
            values[judged] = self.score_pictures(_floats(images[judged]), texts, ids, [rows[i] or {} for i in judged])
        return values

    def score_pictures(
        self,
        pictures: Tensor,
        prompts: Sequence[str],
        rollout_ids: Sequence[str],
        rows: Sequence[Metadata | None] | None = None,
    ) -> FloatArray:
        """As `score`, of pictures [B, 3, H, W], float32 in [0, 1], whose rows the head judges all."""
        if problem := missing(needed_by(self.head), rows, len(prompts)):
            raise RewardError(self.name, problem, rollout_ids)
        try:
            values = torch.as_tensor(self._asked(pictures, list(prompts), rows)).detach().float().cpu().numpy()
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

    def _asked(self, pictures: Tensor, prompts: list[str], rows: Sequence[Metadata | None] | None) -> Tensor:
        head = self.head
        if isinstance(head, ReadsRows) and head.needs:
            return head.score(pictures, prompts, rows=[row or {} for row in rows or ()])
        return head.score(pictures, prompts)


def _floats(images: ImageArray) -> Tensor:
    return torch.from_numpy(np.array(images)).float() / 255


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
        values: [B], raw scores of one head. Without any, the result changes nothing.
    """
    if not len(values):
        return Normalisation()
    wide = values.astype(np.float64)
    return Normalisation(shift=-float(wide.mean()), scale=float(wide.std()) or 1.0)


def mix(
    scores: Mapping[str, FloatArray], weights: Mapping[str, Weights], normalisations: Mapping[str, Normalisation]
) -> FloatArray:
    """The weighted mean of the normalised scores, float32 [B], each over the heads that judge the row.

    Args:
        scores: maps each head to its raw scores [B]; NaN where it does not judge the row.
        weights: maps each head to its weight, a number or [B], >= 0. Their sum over the heads that judge a row must be
            > 0.
        normalisations: maps heads to their normalisations; the scores of other heads stay raw.
    """
    unchanged = Normalisation()
    counted = {name: np.where(np.isnan(values), 0.0, weights[name]) for name, values in scores.items()}
    total = np.sum(list(counted.values()), axis=0)
    parts = [
        np.asarray(counted[name] / total, np.float32) * normalisations.get(name, unchanged)(np.nan_to_num(values))
        for name, values in scores.items()
    ]
    return np.asarray(np.sum(parts, axis=0), np.float32)
