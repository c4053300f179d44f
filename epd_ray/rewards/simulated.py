"""A head that takes time instead of computing: for scale, scheduling and failure tests."""

import time
from collections.abc import Sequence

from torch import Tensor


class SimulatedHead:
    """Closeness of the picture's mean brightness to a target, after a delay.

    Args:
        latency: seconds per call.
        target: brightness that is worth most, in [0, 1].
    """

    model_id = "simulated"

    def __init__(self, *, latency: float = 0.0, target: float = 0.5) -> None:
        self.latency, self.target = latency, target

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(self.latency)
        return -(images.mean(dim=(1, 2, 3)) - self.target).abs()
