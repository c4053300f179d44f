"""Pictures to network pixels, exactly as the preference models' own packages make them, without torchvision.

The rounding matters: resizing a float tensor instead of the 8-bit picture, or with another backend, moves pixels by
0.02, and scores with them.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_bytes(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as uint8 on the CPU, rounded as a saved file would be."""
    return (images * 255).round().to(torch.uint8).cpu()


def pil_pixels(images: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, size, size] by way of PIL: resize the 8-bit picture, crop its centre, normalise.

    Source: the transform of OpenAI's CLIP package, which image-reward and the aesthetic predictor share.
    """
    pictures = (Image.fromarray(array) for array in to_bytes(images).permute(0, 2, 3, 1).numpy())
    resized = [p.resize(short_side(p.size, size), Image.Resampling.BICUBIC) for p in pictures]
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized]))
    return normalise(centre_crop(stacked.permute(0, 3, 1, 2), size).float() / 255)


def tensor_pixels(images: Tensor, size: int) -> Tensor:
    """Pixels [B, 3, size, size] by way of tensors: the 8-bit picture becomes floats first, then is resized.

    Source: HPSv2's transform. Values may leave [0, 1] before they are normalised, as they do there.
    """
    floats = to_bytes(images).float() / 255
    width, height = short_side((floats.shape[3], floats.shape[2]), size)
    if floats.shape[2:] != (height, width):
        floats = interpolate(floats, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return normalise(centre_crop(floats, size))


def short_side(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """(width, height) with the shorter side at `size`; the longer one is cut to whole pixels, as torchvision does."""
    width, height = shape
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """The middle of [B, C, H, W]; halves are rounded to even, as torchvision does (transformers rounds down)."""
    top, left = (round((side - size) / 2) for side in pixels.shape[2:])
    return pixels[:, :, top : top + size, left : left + size]


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
