"""Preference models behind one protocol: score(images [B, 3, H, W] in [0, 1], prompts) -> float32 [B]."""

from epd_ray.registry import Registry
from epd_ray.types import RewardHead

HEADS: Registry[RewardHead] = Registry("reward head", {"clip": "epd_ray.rewards.clip:ClipHead"})
