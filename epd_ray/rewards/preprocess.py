"""Preprocesses pictures exactly as the preference models' own packages do, but without torchvision.

Rounding and resizing must be the same: resizing floats instead of the 8-bit picture, or with another library, changes
pixels by up to 0.02, and therefore the scores.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_bytes(images: Tensor) -> Tensor:
    """Images [..., H, W] in [0, 1] as uint8 in [0, 255] on the CPU, rounded as in an 8-bit image file."""
    return (images * 255).round().to(torch.uint8).cpu()


def as_pictures(images: Tensor) -> list[Image.Image]:
    """Images [b, 3, H, W] in [0, 1] as 8-bit pictures."""
    return [Image.fromarray(array) for array in to_bytes(images).permute(0, 2, 3, 1).numpy()]


def on_square(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """A picture in the middle of a square as wide as its longer side."""
    width, height = picture.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def pil_pixels(images: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, size, size] from images [B, 3, H, W] in [0, 1]: resize in 8 bits with PIL, crop, normalise.

    Source: the transform of OpenAI's CLIP package, which image-reward and the aesthetic predictor share.
    """
    resized = [p.resize(short_side(p.size, size), Image.Resampling.BICUBIC) for p in as_pictures(images)]
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized]))
    return normalise(centre_crop(stacked.permute(0, 3, 1, 2), size).float() / 255)


def tensor_pixels(images: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, size, size] from images [B, 3, H, W] in [0, 1]: resize 8-bit values as floats, crop, normalise.

    Source: HPSv2's transform. As in that transform, resized values may lie slightly outside [0, 1].
    """
    floats = to_bytes(images).float() / 255
    width, height = short_side((floats.shape[3], floats.shape[2]), size)
    if floats.shape[2:] != (height, width):
        floats = interpolate(floats, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return normalise(centre_crop(floats, size))


def short_side(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """(width, height) scaled so that the shorter side is `size`; the longer one is rounded down, as in torchvision."""
    width, height = shape
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """The central square [B, C, size, size]; offsets of half a pixel round to even, as in torchvision.

    Transformers rounds them down.
    """
    top, left = (round((side - size) / 2) for side in pixels.shape[2:])
    return pixels[:, :, top : top + size, left : left + size]


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
