"""Sharpness: how much fine detail a picture has."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from epd_ray.evaluation.metrics.checks import checked_images
from epd_ray.types import FloatArray

LUMA = np.array([0.299, 0.587, 0.114])  # the weights of red, green and blue in ITU-R BT.601


def sharpness(images: npt.NDArray[np.generic]) -> FloatArray:
    """Compute the variance of the Laplacian of the luma of each picture.

    Noise counts as detail, so that a solver which stops early and leaves noise seems sharper. Only pictures of one size
    can be compared.

    Args:
        images: [B, 3, H, W], uint8.

    Returns:
        [B], float32, at least 0, which a plain picture has. Luma is on the scale 0 to 255, as in OpenCV's
        `Laplacian(grey).var()`.

    Raises:
        MetricError: the images have another shape or type.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000 (LAPV).
    """
    # [B, 3, H, W] -> [B, H, W]
    luma = np.einsum("c,bchw->bhw", LUMA, checked_images(images))
    detail = ndimage.laplace(luma, mode="mirror", axes=(1, 2))
    return np.asarray(detail.var(axis=(1, 2)), np.float32)
