"""Reward heads: models that score images [B, 3, H, W] in [0, 1] against prompts, and the mixing of their scores.

HEADS maps the names that configurations use to the classes.
"""

from typing import TYPE_CHECKING

from epd_ray.registry import Registry

if TYPE_CHECKING:
    from epd_ray.types import RewardHead

SERVERS = ("http", "judge")
"""The heads whose model is behind a server, so that they load nothing."""

HEADS: "Registry[RewardHead]" = Registry(
    "reward head",
    {
        "aesthetic": "epd_ray.rewards.aesthetic:AestheticHead",
        "clip": "epd_ray.rewards.clip:ClipHead",
        "deqa": "epd_ray.rewards.deqa:DeqaHead",
        "geneval2": "epd_ray.rewards.geneval2:GenEval2Head",
        "hpsv2.1": "epd_ray.rewards.hpsv2:HpsV21Head",
        "hpsv3": "epd_ray.rewards.hpsv3:HpsV3Head",
        "http": "epd_ray.rewards.http:HttpHead",
        "imagereward": "epd_ray.rewards.imagereward:ImageRewardHead",
        "judge": "epd_ray.rewards.judge:JudgeHead",
        "mps": "epd_ray.rewards.mps:MpsHead",
        "ocr": "epd_ray.rewards.ocr:OcrHead",
        "pickscore": "epd_ray.rewards.pickscore:PickScoreHead",
        "simulated": "epd_ray.rewards.simulated:SimulatedHead",
        "unifiedreward": "epd_ray.rewards.unifiedreward:UnifiedRewardHead",
        "vqascore": "epd_ray.rewards.vqascore:VqaScoreHead",
    },
)
