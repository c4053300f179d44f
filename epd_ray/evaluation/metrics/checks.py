"""Checks of the images and features that metrics take."""

import numpy as np
import numpy.typing as npt

from epd_ray.errors import MetricError

Array = npt.NDArray[np.float64]


def checked_images(images: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Return images [B, 3, H, W], uint8, as they are.

    Raises:
        MetricError: the images have another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
        raise MetricError(f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, 3, H, W]")
    return images.astype(np.uint8, copy=False)


def checked_features(features: npt.NDArray[np.generic]) -> Array:
    """Return features [B, D] as float64.

    Raises:
        MetricError: the features have another number of dimensions, are empty, or have a value that is not finite.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise MetricError(f"features have shape {list(features.shape)}, expected [B, D] with B and D at least 1")
    found = features.astype(np.float64)
    if not np.isfinite(found).all():
        row, column = np.argwhere(~np.isfinite(found))[0]
        raise MetricError(f"features[{row}, {column}] is {found[row, column]}, expected a finite number")
    return found
