"""Reading folders of pictures."""

from pathlib import Path

import numpy as np

from epd_ray.errors import MetricError, PictureError
from epd_ray.storage.pictures import IMAGE_SUFFIXES, decode_picture, files_below, say_left_out
from epd_ray.types import ImageArray


def picture_files(folder: Path) -> list[Path]:
    """List every picture in a folder and its subfolders, in the order of `in_order`; what is left out is logged.

    Raises:
        MetricError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise MetricError(f"{folder} is no folder, expected one with pictures ({', '.join(IMAGE_SUFFIXES)})")
    found = files_below(folder)
    say_left_out(folder, found.left_out)
    if not found.files:
        raise MetricError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return found.files


def read_picture(path: Path) -> ImageArray:
    """Read a picture as [3, H, W], uint8, RGB, decoded by `decode_picture`.

    Raises:
        MetricError: the file cannot be decoded.
    """
    try:
        picture = decode_picture(path)
    except PictureError as error:
        raise MetricError(f"{path} cannot be read as a picture ({error}): make or fetch it again") from error
    return np.asarray(picture, np.uint8).transpose(2, 0, 1)
