"""Backbones and a head for sweeps."""

import time

import ray
import torch

from epd_ray.errors import ModelError
from epd_ray.rewards.simulated import SimulatedHead
from tests.fakes import TableBackbone


def require_group() -> None:
    """Under Tune every process of a trial lives in the trial's placement group."""
    if ray.util.get_current_placement_group() is None:
        raise ModelError("this process is outside of its trial's placement group")


class PlacedBackbone(TableBackbone):
    def __init__(self, **options):
        require_group()
        super().__init__(**options)


class PlacedHead(SimulatedHead):
    def __init__(self, **options):
        require_group()
        super().__init__(**options)


class SlowBackbone(TableBackbone):
    def drift(self, x, sigma, conditioning):
        time.sleep(0.05)
        return super().drift(x, sigma, conditioning)


class TwoPointsBackbone(TableBackbone):
    """Cannot take three points of a batch of 8."""

    def drift(self, x: torch.Tensor, sigma, conditioning):
        if len(x) == 24:
            raise ModelError("three points are too many")
        return super().drift(x, sigma, conditioning)
