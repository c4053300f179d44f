"""Metrics besides rewards: sharpness, diversity of a prompt's pictures, and the Frechet distance of features (FID).

EXTRACTORS lists the networks that compute features.
"""

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
