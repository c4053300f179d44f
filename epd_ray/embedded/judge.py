"""Recognises a scene from its pixels. The judge shares no network, weight or feature with the models that it judges."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from epd_ray.embedded.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    Array,
    Scene,
    Thing,
    coverage,
)

CONTRAST = 0.25  # a pixel belongs to an object when its RGB distance from the background is larger
SPECK = 16  # blobs with fewer pixels are noise; the smallest object has about 70
MIN_OVERLAP = 0.72  # smallest intersection over union with the best fitting ideal shape
MIN_PURITY = 0.7  # smallest share of a blob's pixels that have its colour
SIZE_BORDER = 9.5  # radius in pixels between "small" (at most 7.5) and "large" (at least 11.5)
PLACE_BORDERS = (CANVAS / 2 - 8, CANVAS / 2 + 8)  # borders between the three columns, or rows, in pixels
REFERENCE_RADIUS = 10.0  # pixels


@dataclass(frozen=True)
class Seen:
    """A recognised object, and its centre in pixels from the left (x) and from the top (y)."""

    thing: Thing
    x: float
    y: float


def _unit_areas() -> dict[str, float]:
    middle = np.full((1, 2), CANVAS / 2, np.float32)
    radius = np.full(1, REFERENCE_RADIUS, np.float32)
    return {s: float(coverage(s, middle, radius).sum()) / REFERENCE_RADIUS**2 for s in SHAPES}


UNIT_AREAS = _unit_areas()


def _nearest(pixels: Array, palette: dict[str, tuple[float, float, float]]) -> npt.NDArray[np.intp]:
    table = np.array(list(palette.values()), np.float32)
    return np.asarray(np.linalg.norm(pixels[:, None] - table, axis=-1).argmin(axis=1))


def look(image: Array) -> tuple[str, list[Seen]] | None:
    """The name of the background and the objects on it; None when a blob has no known shape, or several colours.

    Args:
        image: [3, 64, 64], float in [0, 1].
    """
    border = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1).T
    behind = np.median(border, axis=0)
    background = list(BACKGROUNDS)[int(_nearest(behind[None], BACKGROUNDS)[0])]
    mask = np.linalg.norm(image - behind[:, None, None], axis=0) > CONTRAST
    labels, count = ndimage.label(mask)
    seen = []
    for label in range(1, count + 1):
        if (labels == label).sum() < SPECK:
            continue
        found = _identify(labels == label, image, behind)
        if found is None:
            return None
        seen.append(found)
    return background, seen


def _identify(blob: npt.NDArray[np.bool_], image: Array, behind: Array) -> Seen | None:
    """The object that the pixels of a blob [64, 64] show, given the background's colour [3]; None if there is none."""
    ink = np.array(list(COLOURS.values()), np.float32)[_nearest(np.median(image[:, blob], axis=1)[None], COLOURS)[0]]
    step = (ink - behind)[:, None, None]
    covered = (step * (image - behind[:, None, None])).sum(0) / (step**2).sum()
    blob = blob & (covered > 0.5)  # keep pixels of which the object covers more than half
    if blob.sum() < SPECK:
        return None
    inner = ndimage.binary_erosion(blob)  # pixels at the rim mix with the background and would vote for other colours
    votes = np.bincount(_nearest(image[:, inner if inner.any() else blob].T, COLOURS), minlength=len(COLOURS))
    if votes.max() < MIN_PURITY * votes.sum():
        return None
    y, x = (float(c) + 0.5 for c in ndimage.center_of_mass(blob))
    best, overlap, radius = "", 0.0, 0.0
    for shape in SHAPES:
        r = float(np.sqrt(blob.sum() / UNIT_AREAS[shape]))
        center = np.array([[x, y]], np.float32)
        ideal = coverage(shape, center, np.full(1, r, np.float32))[0] > 0.5
        dy, dx = np.array([y - 0.5, x - 0.5]) - ndimage.center_of_mass(ideal)  # a triangle's centroid is off its centre
        ideal = coverage(shape, center + np.array([[dx, dy]], np.float32), np.full(1, r, np.float32))[0] > 0.5
        score = (blob & ideal).sum() / (blob | ideal).sum()
        if score > overlap:
            best, overlap, radius = shape, float(score), r
    if overlap < MIN_OVERLAP:
        return None
    size = "small" if radius < SIZE_BORDER else "large"
    return Seen(Thing(size, list(COLOURS)[int(votes.argmax())], best), x, y)


def agrees(image: Array, scene: Scene) -> bool:
    """Whether a picture shows exactly this scene: every attribute of every object, their layout, and the background.

    Args:
        image: [3, 64, 64], float in [0, 1].
        scene: the scene that the picture should show.
    """
    found = look(image)
    if found is None:
        return False
    background, seen = found
    if background != scene.background or len(seen) != len(scene.things):
        return False
    if len(seen) == 1:
        place = tuple(int(np.digitize(c, PLACE_BORDERS)) for c in (seen[0].x, seen[0].y))
        return seen[0].thing == scene.things[0] and place == PLACES[scene.layout]
    if (seen[0].thing, seen[1].thing) != scene.things:
        seen = seen[::-1]
    if (seen[0].thing, seen[1].thing) != scene.things:
        return False
    dx, dy = seen[0].x - seen[1].x, seen[0].y - seen[1].y
    rx, ry = RELATIONS[scene.layout]
    along, across = (dx * rx, dy) if rx else (dy * ry, dx)
    return along > abs(across)


def scene_accuracy(images: Array, scenes: Sequence[Scene]) -> npt.NDArray[np.bool_]:
    """For each of B pictures, whether it shows its scene, bool [B]; images are [B, 3, 64, 64], float in [0, 1]."""
    return np.array([agrees(image, scene) for image, scene in zip(images, scenes, strict=True)], bool)
