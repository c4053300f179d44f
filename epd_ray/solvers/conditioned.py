"""The drift of a backbone for given prompts, and its initial noise for given seeds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epd_ray.types import Backbone, Conditioning, Drift


def conditioned_drift(backbone: Backbone, conditioning: Conditioning) -> Drift:
    """The backbone's drift for B fixed prompts.

    It takes B rows, or B * K rows where K points of each sample are evaluated at once (row b * K + k). The repeated
    conditioning is kept between calls.
    """
    repeated: dict[int, Conditioning] = {1: conditioning}

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        copies = len(x) // len(conditioning)
        if copies not in repeated:
            repeated[copies] = conditioning.repeat(copies)
        return backbone.drift(x, sigma, repeated[copies])

    return drift


def noises(backbone: Backbone, seeds: Sequence[int]) -> Tensor:
    """Unit noise [B, ...], each row from its own seed."""
    return torch.stack([backbone.noise(seed) for seed in seeds])
