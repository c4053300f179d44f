"""The drift of a backbone for given prompts, and its initial noise for given seeds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epd_ray.errors import TableError
from epd_ray.types import Backbone, Conditioning, Drift, Guidable


class ConditionedDrift:
    """The backbone's drift for B fixed prompts, whose guidance can be set, see `types.GuidableDrift`.

    It takes B rows, or B * K rows where K points of each sample are evaluated at once (row b * K + k). The repeated
    conditioning is kept between calls.

    Args:
        backbone: the frozen model.
        conditioning: B encoded prompts.

    Attributes:
        difference: [B, ...], what the prompt changed when both passes were last made; None before that.
        evals: the rows that were evaluated so far.
        unguided: those of them that took one pass although the prompts are guided.
    """

    def __init__(self, backbone: Backbone, conditioning: Conditioning) -> None:
        self._backbone, self._conditioning = backbone, conditioning
        self._repeated: dict[int, Conditioning] = {1: conditioning}
        self.difference: Tensor | None = None
        self.evals = self.unguided = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.evals += len(x)
        return self._backbone.drift(x, sigma, self._for(x))

    def at(self, scale: Tensor | None, reuse: bool) -> Drift:
        backbone = self._backbone
        if not isinstance(backbone, Guidable):
            raise TableError(
                f"the table sets guidance, which a model of family {backbone.family} does not have: "
                "take its parts guidance and reuse out"
            )

        def drift(x: Tensor, sigma: Tensor) -> Tensor:
            rows = len(self._conditioning)
            copies = len(x) // rows
            own = scale if scale is None or scale.ndim == 0 else scale.repeat_interleave(copies)
            known = None
            if reuse and self.difference is not None:
                known = self.difference.repeat_interleave(copies, 0)
            found, difference = backbone.guided(x, sigma, self._for(x), own, known)
            self.evals += len(x)
            if difference is not None:  # of the last point, where there are several
                self.difference = difference.unflatten(0, (rows, copies))[:, -1]
            elif backbone.classifier_free:
                self.unguided += len(x)
            return found

        return drift

    def _for(self, x: Tensor) -> Conditioning:
        copies = len(x) // len(self._conditioning)
        if copies not in self._repeated:
            self._repeated[copies] = self._conditioning.repeat(copies)
        return self._repeated[copies]


def noises(backbone: Backbone, seeds: Sequence[int]) -> Tensor:
    """Unit noise [B, ...], each row from its own seed."""
    return torch.stack([backbone.noise(seed) for seed in seeds])
