"""What is measured on pictures beside rewards: sharpness, diversity within a prompt, Frechet distance of features."""

from typing import TYPE_CHECKING

from epd_ray.registry import Registry

if TYPE_CHECKING:
    from epd_ray.types import FeatureExtractor

EXTRACTORS: "Registry[FeatureExtractor]" = Registry(
    "feature extractor",
    {
        "clip": "epd_ray.evaluation.metrics.clip:ClipFeatures",
        "inception": "epd_ray.evaluation.metrics.inception:InceptionFeatures",
    },
)
