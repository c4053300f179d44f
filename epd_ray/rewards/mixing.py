"""Mixes the heads' raw scores into the reward, and keeps the running statistics that a z-score needs."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from epd_ray.rewards.scoring import REFERENCE, Normalisation, mix, standardise
from epd_ray.types import FloatArray

Mode = Literal["none", "reference", "zscore"]
WINDOW = 1024
"""Number of most recent training images whose scores define the running z-score."""


class Mixer:
    """Computes rewards as the weighted mean of the heads' normalised scores.

    Args:
        weights: maps each head's name in the run to its weight, >= 0.
        kinds: maps each head's name in the run to its name in the registry HEADS.
        mode: how raw scores are normalised: "none" keeps them, "reference" applies the formulas in REFERENCE, "zscore"
            subtracts the mean and divides by the standard deviation over the last WINDOW training images.
    """

    def __init__(self, weights: Mapping[str, float], kinds: Mapping[str, str], mode: Mode) -> None:
        self._weights, self._mode = dict(weights), mode
        weighted = [name for name, weight in weights.items() if weight] if mode == "reference" else []
        self._fixed = {name: REFERENCE[kinds[name]] for name in weighted}
        self._seen: dict[str, FloatArray] = {}
        self._anchor: dict[str, FloatArray] = {}

    def observe(self, batches: Sequence[Mapping[str, FloatArray]]) -> None:
        """Add an iteration's raw scores to the window of the running z-score."""
        if self._mode != "zscore":
            return
        for name in self._weights:
            values = [self._seen.get(name, np.empty(0, np.float32)), *(batch[name] for batch in batches)]
            self._seen[name] = np.concatenate(values)[-WINDOW:]

    def train(self, scores: Mapping[str, FloatArray]) -> FloatArray:
        """The rewards [B] of training images; a z-score uses the window of recent training images."""
        return mix(scores, self._weights, self._normalisations(self._seen))

    def held_out(self, scores: Mapping[str, FloatArray]) -> FloatArray:
        """The rewards [B] of evaluation images; a z-score uses the scores of this method's first call in the run.

        Rewards of different iterations therefore stay comparable.
        """
        if self._mode == "zscore" and not self._anchor:
            self._anchor = {name: np.asarray(values, np.float32) for name, values in scores.items()}
        return mix(scores, self._weights, self._normalisations(self._anchor))

    def _normalisations(self, seen: Mapping[str, FloatArray]) -> dict[str, Normalisation]:
        return self._fixed or {name: standardise(values) for name, values in seen.items()}

    def state(self) -> dict[str, Any]:
        """The running statistics as arrays by head, for a checkpoint."""
        return {"seen": dict(self._seen), "anchor": dict(self._anchor)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""
        self._seen = {name: np.asarray(v, np.float32) for name, v in state["seen"].items()}
        self._anchor = {name: np.asarray(v, np.float32) for name, v in state["anchor"].items()}
