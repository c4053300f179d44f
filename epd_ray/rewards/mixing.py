"""Mixes the heads' raw scores into the reward, and keeps the running statistics that a z-score needs."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from epd_ray.rewards.routes import Routes
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
        routes: the heads that judge each prompt, and their weights there; None where all judge all of them.
    """

    def __init__(
        self, weights: Mapping[str, float], kinds: Mapping[str, str], mode: Mode, routes: Routes | None = None
    ) -> None:
        self._weights, self._mode, self._routes = dict(weights), mode, routes
        weighted = [name for name, weight in weights.items() if weight] if mode == "reference" else []
        self._fixed = {name: REFERENCE[kinds[name]] for name in weighted}
        self._seen: dict[str, FloatArray] = {}
        self._anchor: dict[str, FloatArray] = {}

    def observe(self, batches: Sequence[Mapping[str, FloatArray]]) -> None:
        """Add an iteration's raw scores to the window of the running z-score."""
        if self._mode != "zscore":
            return
        for name in self._weights:
            values = [self._seen.get(name, np.empty(0, np.float32)), *(_judged(batch[name]) for batch in batches)]
            self._seen[name] = np.concatenate(values)[-WINDOW:]

    def train(self, scores: Mapping[str, FloatArray], prompts: Sequence[str]) -> FloatArray:
        """The rewards [B] of training images; a z-score uses the window of recent training images.

        Args:
            scores: maps each head to its raw scores [B]; NaN where it does not judge the row.
            prompts: the prompt of each image.
        """
        return self._mixed(scores, prompts, self._seen)

    def held_out(self, scores: Mapping[str, FloatArray], prompts: Sequence[str]) -> FloatArray:
        """The rewards [B] of evaluation images; the arguments are those of `train`.

        A z-score uses the scores of the first call in the run in which a head judged an image, so that the rewards of
        different iterations stay comparable.
        """
        if self._mode == "zscore":
            for name, values in scores.items():
                if not len(self._anchor.get(name, ())):
                    self._anchor[name] = _judged(values)
        return self._mixed(scores, prompts, self._anchor)

    def _mixed(
        self, scores: Mapping[str, FloatArray], prompts: Sequence[str], seen: Mapping[str, FloatArray]
    ) -> FloatArray:
        weights = self._weights if self._routes is None else self._routes.weights(prompts)
        return mix(scores, weights, self._normalisations(seen))

    def _normalisations(self, seen: Mapping[str, FloatArray]) -> dict[str, Normalisation]:
        return self._fixed or {name: standardise(values) for name, values in seen.items()}

    def state(self) -> dict[str, Any]:
        """The running statistics as arrays by head, for a checkpoint."""
        return {"seen": dict(self._seen), "anchor": dict(self._anchor)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""
        self._seen = {name: np.asarray(v, np.float32) for name, v in state["seen"].items()}
        self._anchor = {name: np.asarray(v, np.float32) for name, v in state["anchor"].items()}


def _judged(values: FloatArray) -> FloatArray:
    return np.asarray(values[~np.isnan(values)], np.float32)
