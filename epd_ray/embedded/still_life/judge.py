"""Reads a picture's pixels and says whether a caption's claims hold; it shares no network or feature with any model.

Things have saturated colours, grounds do not: pixels of one colour that touch are one thing. Its outline is compared
with each shape at each rotation. A ground's pattern is found by comparing it with patterns that fit it best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from epd_ray.embedded.still_life.drawing import distances
from epd_ray.embedded.still_life.scenes import CANVAS, COLOURS, RELATIONS, SHAPES, Array, Scene, Thing

SATURATION, BRIGHTNESS = 0.5, 0.15  # least of a pixel that belongs to a thing; grounds have at most 0.22 of saturation
SPECK = 20  # blobs with fewer pixels are no thing; the smallest thing, a ring with an outline, has about 45
MIN_OVERLAP = 0.7  # smallest intersection over union with the best fitting ideal shape
SIZE_BORDER = 10.0  # radius in pixels between "small" (at most 8.5) and "large" (at least 11.5)
SYMMETRY = {"circle": 1, "ring": 1, "square": 4, "cross": 4, "triangle": 3, "star": 5}
ANGLE_STEP = math.radians(7.5)
PATCH = 18  # half the side in pixels of the square in which a blob is compared with a shape
GRID, REACH = 96, 1.5  # cells, and half the side in radii, of the grids that hold the ideal shapes
_AXIS = np.arange(CANVAS) + 0.5

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """A recognised thing.

    Attributes:
        thing: its size, colour and best fitting shape.
        x, y: its centre in pixels from the left and from the top.
        overlap: intersection over union with the ideal shape, in [0, 1].
    """

    thing: Thing
    x: float
    y: float
    overlap: float


def hues(image: Array) -> tuple[Array, Array, Array]:
    """Hue in degrees, saturation and brightness in [0, 1] of a picture [3, H, W], each [H, W]."""
    high, low = image.max(0), image.min(0)
    span = np.maximum(high - low, 1e-6)
    red, green, blue = image
    hue = np.where(
        high == red,
        (green - blue) / span % 6,
        np.where(high == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    return np.asarray(60 * hue, np.float32), span / np.maximum(high, 1e-6), high


def look(image: Array) -> list[Seen]:
    """The things that a picture shows; what has none of the shapes is left out.

    Args:
        image: [3, 64, 64], float in [0, 1].
    """
    return [seen for seen in _blobs(image) if seen.overlap >= MIN_OVERLAP]


def _blobs(image: Array) -> list[Seen]:
    hue, saturation, brightness = hues(image)
    away = np.abs((hue[None] - np.array(list(COLOURS.values()))[:, None, None] + 180) % 360 - 180)
    colours = np.where((saturation > SATURATION) & (brightness > BRIGHTNESS), away.argmin(0), -1)
    seen = []
    for index, colour in enumerate(COLOURS):
        labels, count = ndimage.label(colours == index, np.ones((3, 3)))
        for label in range(1, count + 1):
            blob = labels == label
            if blob.sum() >= SPECK:
                seen.append(_identify(blob, colour))
    return seen


@cache
def _ideals(shape: str) -> tuple[Mask, float]:
    """A shape of radius 1: its insides [A, GRID, GRID] at A angles, on a grid over [-REACH, REACH], and its area."""
    turns = 2 * math.pi / SYMMETRY[shape]
    angles = [0.0] if SYMMETRY[shape] == 1 else list(np.arange(0, turns, ANGLE_STEP))
    scale = GRID / (2 * REACH)  # the radius of the shape in cells of the grid
    count = len(angles)
    inside = distances(
        [shape] * count, np.full((count, 2), GRID / 2), np.full(count, scale), np.array(angles), side=GRID
    ) < 0  # fmt: skip
    return inside, float(inside[0].sum()) / scale**2


def _identify(blob: Mask, colour: str) -> Seen:
    """The shape that fits a blob [64, 64] best, drawn around the blob's centroid with the blob's area."""
    y, x = (float(c) + 0.5 for c in ndimage.center_of_mass(blob))
    area = float(blob.sum())
    rows, columns = (slice(max(0, int(c) - PATCH), int(c) + PATCH) for c in (y, x))
    part = blob[rows, columns]
    dy, dx = _AXIS[rows, None] - y, _AXIS[None, columns] - x
    best, overlap, radius = "", 0.0, 0.0
    for shape in SHAPES:
        ideals, unit = _ideals(shape)
        r = math.sqrt(area / unit)
        i, j = (np.clip((d / r + REACH) * (GRID / (2 * REACH)), 0, GRID - 1).astype(np.intp) for d in (dy, dx))
        inside = ideals[:, i, j]
        common = (inside & part).sum((1, 2))
        scores = common / (inside.sum((1, 2)) + area - common)
        if scores.max() > overlap:
            best, overlap, radius = shape, float(scores.max()), r
    return Seen(Thing("small" if radius < SIZE_BORDER else "large", colour, best), x, y, overlap)


def agrees(image: Array, scene: Scene) -> bool:
    """Whether a picture shows what the scene tells: its named things, their relation and the number of things.

    The ground's pattern is not judged.

    Args:
        image: [3, 64, 64], float in [0, 1].
        scene: what the picture's caption tells.
    """
    seen = look(image)
    if scene.others is not None and len(seen) != len(scene.things) + scene.others:
        return False
    if len(seen) < max(1, len(scene.things)):
        return False
    if len(scene.things) < 2:
        return not scene.things or any(_is(s, scene.things[0]) for s in seen)
    first, second = scene.things
    return any(
        _is(a, first) and _is(b, second) and _related(a, b, scene.relation) for a in seen for b in seen if a is not b
    )


def _is(seen: Seen, thing: Thing) -> bool:
    pairs = ((thing.size, seen.thing.size), (thing.colour, seen.thing.colour), (thing.shape, seen.thing.shape))
    return all(told in ("", found) for told, found in pairs)


def _related(first: Seen, second: Seen, relation: str) -> bool:
    if relation not in RELATIONS:
        return True
    dx, dy = first.x - second.x, first.y - second.y
    rx, ry = RELATIONS[relation]
    along, across = (dx * rx, dy) if rx else (dy * ry, dx)
    return along > abs(across)


def scene_accuracy(images: Array, scenes: Sequence[Scene]) -> npt.NDArray[np.bool_]:
    """For each of B pictures, whether it shows what its scene tells, bool [B]; images [B, 3, 64, 64] in [0, 1]."""
    return np.array([agrees(image, scene) for image, scene in zip(images, scenes, strict=True)], bool)
