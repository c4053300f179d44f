"""A head without a network, which waits instead: for tests of scaling, scheduling and failures."""

import time
from collections.abc import Sequence

from torch import Tensor


class SimulatedHead:
    """Scores by minus the distance of a picture's mean brightness from a target, after a delay.

    Args:
        latency: seconds that each call of `score` waits.
        target: mean brightness with the highest score, in [0, 1].
    """

    model_id = "simulated"

    def __init__(self, *, latency: float = 0.0, target: float = 0.5) -> None:
        self.latency, self.target = latency, target

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(self.latency)
        return -(images.mean(dim=(1, 2, 3)) - self.target).abs()
