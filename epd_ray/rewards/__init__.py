"""Preference models behind one protocol: score(images [B, 3, H, W] in [0, 1], prompts) -> float32 [B]."""

from typing import TYPE_CHECKING

from epd_ray.registry import Registry

if TYPE_CHECKING:
    from epd_ray.types import RewardHead

HEADS: "Registry[RewardHead]" = Registry(
    "reward head",
    {
        "clip": "epd_ray.rewards.clip:ClipHead",
        "simulated": "epd_ray.rewards.simulated:SimulatedHead",
    },
)
