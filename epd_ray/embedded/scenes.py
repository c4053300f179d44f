"""The scenes of the embedded model: flat-coloured shapes on a plain background, each scene with its caption.

A single object has a place on the canvas; two objects have a relation. Shapes are drawn from signed distances, so a
batch renders in a few milliseconds and edges are anti-aliased.
"""

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from epd_ray.errors import PromptError
from epd_ray.randomness import Purpose, stream

CANVAS = 64
Split = Literal["train", "validation", "test"]
Array = npt.NDArray[np.float32]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.75),
    "orange": (1.00, 0.50, 0.00),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "gray": (0.5, 0.5, 0.5),
    "black": (0.0, 0.0, 0.0),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES: dict[str, tuple[float, float]] = {"small": (6.0, 7.5), "large": (11.5, 13.5)}  # range of the radius in pixels
PLACES: dict[str, tuple[int, int]] = {  # column and row in a 3 x 3 grid
    "in the center": (1, 1),
    "at the left": (0, 1),
    "at the right": (2, 1),
    "at the top": (1, 0),
    "at the bottom": (1, 2),
    "at the top left": (0, 0),
    "at the top right": (2, 0),
    "at the bottom left": (0, 2),
    "at the bottom right": (2, 2),
}
RELATIONS: dict[str, tuple[int, int]] = {  # direction from the second thing to the first
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
ONE_THING: dict[Split, int] = {"train": 1292, "validation": 155, "test": 173}
TWO_THINGS: dict[Split, int] = {"train": 16961, "validation": 2155, "test": 2124}
"""Number of different scenes with one and with two objects."""

WORDS = {word for text in (*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *PLACES, *RELATIONS) for word in text.split()} | {
    *("a", "an", "on", "and", "background", "with", "the"),
}
"""The words that the embedded models' tokenizer knows."""

MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, order=True)
class Thing:
    """One object, such as "small red circle"."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background.

    Attributes:
        things: the objects.
        layout: a key of PLACES for one object, of RELATIONS for two.
        background: a key of BACKGROUNDS.
    """

    things: tuple[Thing, ...]
    layout: str
    background: str

    @property
    def caption(self) -> str:
        """The text that describes the scene in training and in prompts, at most 15 words."""
        where = self.layout if len(self.things) == 1 else f"{self.layout} {_article(self.things[1])}"
        return f"{_article(self.things[0])} {where} on a {self.background} background"

    def canonical(self) -> "Scene":
        """The same scene with its objects in sorted order, so that "A above B" and "B below A" are equal."""
        if len(self.things) == 2 and self.things[1] < self.things[0]:
            return Scene(self.things[::-1], MIRRORED[self.layout], self.background)
        return self

    @property
    def split(self) -> Split:
        """The split, which a hash of the canonical caption determines: 80 % train, 10 % validation, 10 % test.

        "A above B" and "B below A" are therefore in the same split.
        """
        tenth = zlib.crc32(self.canonical().caption.encode()) % 10
        return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def _article(thing: Thing) -> str:
    return f"a {thing}"


def parse(caption: str) -> Scene | None:
    """The scene that a caption describes, or None when the text is not a caption of such a scene."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        return None
    first, where, relation, second, background = match.group("first", "place", "relation", "second", "background")
    things = tuple(Thing(*t.split()) for t in (first, second) if t is not None)
    return Scene(things, where or relation, background)


def _caption_pattern() -> re.Pattern[str]:
    def one_of(words: Iterable[str]) -> str:
        return "|".join(sorted(words, key=len, reverse=True))

    thing = f"(?:{one_of(SIZES)}) (?:{one_of(COLOURS)}) (?:{one_of(SHAPES)})"
    layout = f"(?:(?P<place>{one_of(PLACES)})|(?P<relation>{one_of(RELATIONS)}) a (?P<second>{thing}))"
    return re.compile(f"a (?P<first>{thing}) {layout} on a (?P<background>{one_of(BACKGROUNDS)}) background")


_CAPTION = _caption_pattern()


def random_scene(rng: np.random.Generator, num_things: int) -> Scene:
    """A random scene of one object, or of two different objects; every attribute is uniformly distributed."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    def thing() -> Thing:
        return Thing(pick(tuple(SIZES)), pick(tuple(COLOURS)), pick(SHAPES))

    things: tuple[Thing, ...] = (thing(),)
    while len(things) < num_things:
        other = thing()
        if other != things[0]:
            things += (other,)
    return Scene(things, pick(tuple(PLACES) if num_things == 1 else tuple(RELATIONS)), pick(tuple(BACKGROUNDS)))


def random_scenes(rng: np.random.Generator, split: Split, two_things: float = 0.6) -> Iterator[Scene]:
    """An endless sequence of random scenes of one split; `two_things` in [0, 1] is the share with two objects."""
    while True:
        scene = random_scene(rng, 2 if rng.random() < two_things else 1)
        if scene.split == split:
            yield scene


def count_scenes(split: Split, two_things: float) -> int:
    """The number of different scenes of a split, of which the share `two_things` in [0, 1] has two objects."""
    return (ONE_THING[split] if two_things < 1 else 0) + (TWO_THINGS[split] if two_things > 0 else 0)


def distinct_scenes(split: Split, count: int, seed: int, two_things: float) -> list[Scene]:
    """`count` different scenes of a split; equal arguments give equal scenes.

    Raises:
        PromptError: the split has fewer scenes.
    """
    if count > (there := count_scenes(split, two_things)):
        raise PromptError(f"{count} {split} scenes asked, {there} exist with two_things={two_things:g}: ask for fewer")
    found: dict[Scene, Scene] = {}
    for scene in random_scenes(stream(Purpose.SCENES, seed), split, two_things):
        found.setdefault(scene.canonical(), scene)
        if len(found) == count:
            break
    return list(found.values())


def altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed: a hard negative for contrastive training."""

    def other(options: Sequence[str], current: str) -> str:
        rest = [o for o in options if o != current]
        return rest[int(rng.integers(len(rest)))]

    which = int(rng.integers(6))
    if which == 0:
        return replace(scene, background=other(tuple(BACKGROUNDS), scene.background))
    if which == 1:
        layouts = tuple(PLACES) if len(scene.things) == 1 else tuple(RELATIONS)
        return replace(scene, layout=other(layouts, scene.layout))
    if which == 2 and len(scene.things) == 2:  # the two objects exchange their colours; the caption's words stay
        first, second = scene.things
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        if swapped != scene.things and swapped[0] != swapped[1]:
            return replace(scene, things=swapped)
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    attribute = ("size", "colour", "shape")[int(rng.integers(3))]
    options = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES}[attribute]
    changed = replace(thing, **{attribute: other(options, getattr(thing, attribute))})
    things = tuple(changed if i == index else t for i, t in enumerate(scene.things))
    if len(set(things)) < len(things):  # both objects became equal: change something else
        return altered(scene, rng)
    return replace(scene, things=things)


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> Array:
    """Draw B scenes with random offsets and radii; returns images [B, 3, 64, 64], float32 in [0, 1]."""
    images = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32)[:, :, None, None]
    images = np.broadcast_to(images, (len(scenes), 3, CANVAS, CANVAS)).copy()
    centers, radii = zip(*(_layout(scene, rng) for scene in scenes), strict=True)
    for slot in range(2):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes) if len(s.things) > slot and s.things[slot].shape == shape]
            if not rows:
                continue
            alpha = coverage(
                shape, np.stack([centers[i][slot] for i in rows]), np.array([radii[i][slot] for i in rows])
            )
            ink = np.array([COLOURS[scenes[i].things[slot].colour] for i in rows], np.float32)[:, :, None, None]
            images[rows] += alpha[:, None] * (ink - images[rows])
    return images


def _layout(scene: Scene, rng: np.random.Generator) -> tuple[Array, Array]:
    """Centres [n, 2] (x, y) and radii [n] of the scene's n objects, in pixels."""
    radii = np.array([rng.uniform(*SIZES[t.size]) for t in scene.things], np.float32)
    middle = CANVAS / 2
    if len(scene.things) == 1:
        grid = np.array([PLACES[scene.layout]], np.float32)
        return middle + 16 * (grid - 1) + rng.uniform(-2, 2, (1, 2)).astype(np.float32), radii
    direction = np.array(RELATIONS[scene.layout], np.float32)
    along = np.stack([16 * direction, -16 * direction]) + rng.uniform(-1.5, 1.5, (2, 2)) * np.abs(direction)
    across = rng.uniform(-5, 5, (2, 2)) * (1 - np.abs(direction))
    return (middle + along + across).astype(np.float32), radii


def coverage(shape: str, centers: Array, radii: Array) -> Array:
    """The share of each pixel that a shape covers.

    Args:
        shape: one of SHAPES.
        centers: [B, 2], x and y in pixels.
        radii: [B], in pixels.

    Returns:
        [B, 64, 64], float32 in [0, 1].
    """
    axis = np.arange(CANVAS, dtype=np.float32) + 0.5
    x = axis[None, None, :] - centers[:, 0, None, None]
    y = axis[None, :, None] - centers[:, 1, None, None]
    distance = _signed_distance(shape, x, y, radii[:, None, None])
    return np.asarray(np.clip(0.5 - distance, 0, 1), np.float32)


def _signed_distance(shape: str, x: Array, y: Array, r: Array) -> Array:
    """Distance to the outline in pixels, negative inside; the five shapes have similar areas for equal radius r."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - 0.95 * r)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.85 * r)
    if shape == "triangle":
        side = math.cos(math.pi / 6) * np.abs(x) - 0.5 * y  # the two slanted sides; y increases downwards
        return np.asarray(np.maximum(side, y) - 0.56 * r)
    if shape == "cross":
        long, short = 1.0 * r, 0.36 * r
        upright = np.maximum(np.abs(x) - short, np.abs(y) - long)
        return np.asarray(np.minimum(upright, np.maximum(np.abs(x) - long, np.abs(y) - short)))
    # Star: symmetry maps the plane to half of one of its five points, in which the outline is a straight line.
    point = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + point / 2) % point - point / 2)
    length = np.hypot(x, y)
    tip, notch = 1.1, 0.48
    nx, ny = notch * math.sin(point / 2), tip - notch * math.cos(point / 2)
    norm = math.hypot(nx, ny)
    along = (nx * length * np.cos(angle) + ny * length * np.sin(angle)) / norm
    return np.asarray(along - r * tip * nx / norm)
