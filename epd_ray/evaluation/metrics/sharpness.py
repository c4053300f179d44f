"""How much fine detail a picture has."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from epd_ray.evaluation.metrics.checks import checked_images
from epd_ray.types import FloatArray

LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B: ITU-R BT.601


def sharpness(images: npt.NDArray[np.generic]) -> FloatArray:
    """The variance of the Laplacian of the luma, per picture.

    Noise is detail to it as well: a solver that stops early looks sharper by it. It compares pictures of one size.

    Args:
        images: [B, 3, H, W], uint8.

    Returns:
        float32 [B], at least 0; 0 for a plain area. On the scale 0 to 255, as OpenCV's `Laplacian(grey).var()`.

    Raises:
        MetricError: other images.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000 (LAPV).
    """
    # [B, 3, H, W] -> [B, H, W]
    luma = np.einsum("c,bchw->bhw", LUMA, checked_images(images))
    detail = ndimage.laplace(luma, mode="mirror", axes=(1, 2))
    return np.asarray(detail.var(axis=(1, 2)), np.float32)
