"""Damages pictures of scenes in known ways, so that a preference model can learn which of two pictures is better."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from epd_ray.embedded.still_life.drawing import HUE_SPREAD, Drawn, Picture, compose, draw
from epd_ray.embedded.still_life.scenes import CANVAS, COLOURS, SHAPES, Array, Scene, Thing

Damage = Callable[[Scene, Picture, np.random.Generator], Array]
"""Draws a damaged version [3, 64, 64] of a picture of a scene."""


def _changed(picture: Picture, index: int, thing: Drawn | None, rng: np.random.Generator) -> Array:
    """The picture with its thing at `index` replaced, or removed if there is none."""
    things = (*picture.things[:index], *((thing,) if thing else ()), *picture.things[index + 1 :])
    image: Array = draw([replace(picture, things=things)], rng)[0]
    return image


def _one_named(scene: Scene, picture: Picture, rng: np.random.Generator) -> int:
    """The place among the picture's things of a random named one, or of any where none is named."""
    count = len(picture.things)
    return int(rng.integers(count - len(scene.things) if scene.things else 0, count))


def _blurred(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    sigma = rng.uniform(0.9, 2.0)
    return np.asarray(ndimage.gaussian_filter(draw([picture], rng)[0], (0, sigma, sigma)))


def _bent(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    """Outlines and patterns wobble: every pixel is taken from a place some pixels away, which varies smoothly."""
    shift = ndimage.gaussian_filter(rng.standard_normal((2, CANVAS, CANVAS)), (0, 4, 4), mode="wrap")
    shift *= rng.uniform(0.8, 2.2) / shift.std()
    places = np.indices((CANVAS, CANVAS)) + shift
    image = draw([picture], rng)[0]
    return np.stack([ndimage.map_coordinates(channel, places, order=1, mode="nearest") for channel in image])


def _double(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    """Two pictures of the scene show through each other, as where a sampler has not decided."""
    share = rng.uniform(0.25, 0.5)
    first, second = draw([picture, compose(scene, rng)], rng)
    return np.asarray(first + np.float32(share) * (second - first))


def _faint(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    """One named thing is half transparent."""
    whole, without = draw([picture], rng)[0], _changed(picture, _one_named(scene, picture, rng), None, rng)
    return np.asarray(whole + np.float32(rng.uniform(0.4, 0.75)) * (without - whole))


def _missing(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    return _changed(picture, _one_named(scene, picture, rng), None, rng)


def _wrong(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    """A told colour or shape of a named thing is another; where none is told, the thing is missing."""
    index = _one_named(scene, picture, rng)
    drawn = picture.things[index]
    told = scene.things[index - len(picture.things)] if scene.things else Thing()
    options = [name for name in ("colour", "shape") if getattr(told, name)]
    if not options:
        return _changed(picture, index, None, rng)
    if options[int(rng.integers(len(options)))] == "shape":
        shapes = [s for s in SHAPES if s != drawn.told.shape]
        other = replace(drawn, told=replace(drawn.told, shape=shapes[int(rng.integers(len(shapes)))]))
    else:
        colours = [c for c in COLOURS if c != drawn.told.colour]
        colour = colours[int(rng.integers(len(colours)))]
        hue = COLOURS[colour] + float(rng.uniform(-HUE_SPREAD, HUE_SPREAD))
        other = replace(drawn, told=replace(drawn.told, colour=colour), hue=hue)
    return _changed(picture, index, other, rng)


def _halves(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    """A thing is half of one shape and half of another, or of another colour."""
    index = _one_named(scene, picture, rng)
    drawn = picture.things[index]
    shapes = [s for s in SHAPES if s != drawn.told.shape]
    told = replace(drawn.told, shape=shapes[int(rng.integers(len(shapes)))])
    hue = drawn.hue if rng.random() < 0.5 else float(rng.uniform(0, 360))
    first, second = draw([picture], rng)[0], _changed(picture, index, replace(drawn, told=told, hue=hue), rng)
    y, x = np.indices((CANVAS, CANVAS)) + 0.5
    turn = rng.uniform(0, 2 * np.pi)
    side = (x - drawn.x) * np.cos(turn) + (y - drawn.y) * np.sin(turn)
    share = 1 / (1 + np.exp(-side / 1.5))
    return np.asarray(first + share.astype(np.float32) * (second - first))


def _grainy(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    """Noise whose grains are one to three pixels wide."""
    grain = ndimage.gaussian_filter(rng.standard_normal((3, CANVAS, CANVAS)), (0, *[rng.uniform(0.3, 1.2)] * 2))
    return np.asarray(draw([picture], rng)[0] + rng.uniform(0.06, 0.15) * grain / grain.std(), np.float32)


def _strained(scene: Scene, picture: Picture, rng: np.random.Generator) -> Array:
    """Contrast is too strong or too weak, as with a guidance scale that is too large or too small."""
    factor = rng.uniform(1.4, 2.0) if rng.random() < 0.6 else rng.uniform(0.45, 0.7)
    image = draw([picture], rng)[0]
    middle = image.mean((1, 2), keepdims=True)
    return np.asarray(middle + np.float32(factor) * (image - middle))


DAMAGES: Mapping[str, Damage] = {
    "blurred": _blurred,
    "bent": _bent,
    "double exposure": _double,
    "faint thing": _faint,
    "missing thing": _missing,
    "wrong attribute": _wrong,
    "two halves": _halves,
    "grain": _grainy,
    "contrast": _strained,
}


def damaged(scenes: Sequence[Scene], pictures: Sequence[Picture], rng: np.random.Generator) -> tuple[Array, list[str]]:
    """Damage each of B pictures of B scenes in a random way.

    Returns:
        Images [B, 3, 64, 64], float32 in [0, 1], and the names of the damages.
    """
    names = list(DAMAGES)
    kinds = [names[int(rng.integers(len(names)))] for _ in scenes]
    drawn = [DAMAGES[kind](s, p, rng) for kind, s, p in zip(kinds, scenes, pictures, strict=True)]
    return np.clip(np.stack(drawn), 0, 1).astype(np.float32), kinds
