"""Reading folders of pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from epd_ray.errors import MetricError
from epd_ray.score.inputs import IMAGE_SUFFIXES, in_order
from epd_ray.types import ImageArray


def picture_files(folder: Path) -> list[Path]:
    """List every picture in a folder and its subfolders, in the order of `in_order`.

    Raises:
        MetricError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise MetricError(f"{folder} is no folder, expected one with pictures ({', '.join(IMAGE_SUFFIXES)})")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not found:
        raise MetricError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return in_order(folder, found)


def read_picture(path: Path) -> ImageArray:
    """Read a picture as [3, H, W], uint8, RGB.

    Raises:
        MetricError: the file cannot be read, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise MetricError(f"{path} has mode {picture.mode}, expected 8 bits a channel: convert it")
            return np.asarray(picture.convert("RGB"), np.uint8).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises any of these for a damaged file
        said = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        why = " ".join(said.split())
        raise MetricError(f"{path} cannot be read as a picture ({why}): make or fetch it again") from error
