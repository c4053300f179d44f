"""Features of picture sets on a disk, so that one more sampler in an evaluation computes nothing again."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from epd_ray.errors import MetricError
from epd_ray.metrics.checks import checked_images
from epd_ray.store import whole
from epd_ray.types import FeatureExtractor, FloatArray, ImageArray

NAME = "features"


@dataclass(frozen=True)
class FeatureCache:
    """A folder with a safetensors file per picture set and extractor, named after what decides its content.

    Attributes:
        folder: made when something is kept.
    """

    folder: Path

    def features(self, extractor: FeatureExtractor, images: ImageArray) -> FloatArray:
        """Features [B, D] of images [B, 3, H, W], uint8: kept ones, or else computed and kept.

        Raises:
            MetricError: other images, an extractor that answers with another shape, or a damaged file.
            RunDirectoryError: the disk refuses.
        """
        expected = (len(checked_images(images)), extractor.dimension)
        path = self.folder / f"{_key(extractor, images)}.safetensors"
        if path.is_file():
            return _read(path, expected)
        found = np.ascontiguousarray(extractor.features(images), np.float32)
        if found.shape != expected:
            shape = f"{list(found.shape)}, expected {list(expected)}"
            raise MetricError(f"extractor {extractor.model_id!r} gave features of shape {shape}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            save_file({NAME: found}, partial, {"model": extractor.model_id, "revision": extractor.revision})
        return found


def _key(extractor: FeatureExtractor, images: ImageArray) -> str:
    """Of the pixels in their order and of who looks at them."""
    digest = hashlib.sha256(repr((extractor.model_id, extractor.revision, images.shape)).encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()[:32]


def _read(path: Path, expected: tuple[int, int]) -> FloatArray:
    try:
        found = load_file(path)[NAME]
    except (SafetensorError, KeyError) as error:
        raise MetricError(f"{path} is damaged ({error}): delete it, and its features are computed again") from error
    if found.shape != expected or found.dtype != np.float32:
        kind = f"{found.dtype} {list(found.shape)}, expected float32 {list(expected)}"
        raise MetricError(f"{path} is damaged (it holds {kind}): delete it, and its features are computed again")
    return found
