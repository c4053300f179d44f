"""From raw scores to the reward, with the running state that a z-score needs."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from epd_ray.rewards.scoring import REFERENCE, Normalisation, mix, standardise
from epd_ray.types import FloatArray

Mode = Literal["none", "reference", "zscore"]
WINDOW = 1024
"""Images that a running z-score looks back on."""


class Mixer:
    """The weighted mean over heads, normalised the same way for a whole batch.

    Args:
        weights: head's name in the run -> its share.
        kinds: head's name in the run -> its registry name.
        mode: "none", the raw values; "reference", its clamps; "zscore", over the last WINDOW training images.
    """

    def __init__(self, weights: Mapping[str, float], kinds: Mapping[str, str], mode: Mode) -> None:
        self._weights, self._mode = dict(weights), mode
        learned_from = [name for name, weight in weights.items() if weight] if mode == "reference" else []
        self._fixed = {name: REFERENCE[kinds[name]] for name in learned_from}
        self._seen: dict[str, FloatArray] = {}
        self._anchor: dict[str, FloatArray] = {}

    def observe(self, batches: Sequence[Mapping[str, FloatArray]]) -> None:
        """Take an iteration's raw scores into the window."""
        if self._mode != "zscore":
            return
        for name in self._weights:
            values = [self._seen.get(name, np.empty(0, np.float32)), *(batch[name] for batch in batches)]
            self._seen[name] = np.concatenate(values)[-WINDOW:]

    def train(self, scores: Mapping[str, FloatArray]) -> FloatArray:
        """Rewards [B] of training images, against the window."""
        return mix(scores, self._weights, self._normalisations(self._seen))

    def held_out(self, scores: Mapping[str, FloatArray]) -> FloatArray:
        """Rewards [B] that stay comparable through a run: a z-score is against the first scores ever given here."""
        if self._mode == "zscore" and not self._anchor:
            self._anchor = {name: np.asarray(values, np.float32) for name, values in scores.items()}
        return mix(scores, self._weights, self._normalisations(self._anchor))

    def _normalisations(self, seen: Mapping[str, FloatArray]) -> dict[str, Normalisation]:
        return self._fixed or {name: standardise(values) for name, values in seen.items()}

    def state(self) -> dict[str, Any]:
        """Arrays by head, to go on exactly."""
        return {"seen": dict(self._seen), "anchor": dict(self._anchor)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._seen = {name: np.asarray(v, np.float32) for name, v in state["seen"].items()}
        self._anchor = {name: np.asarray(v, np.float32) for name, v in state["anchor"].items()}
