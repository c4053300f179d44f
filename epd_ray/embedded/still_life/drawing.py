"""Draws pictures of scenes; everything that a scene's caption leaves open is drawn at random.

Shapes are drawn from signed distances to their outlines, so that a batch is drawn in a few milliseconds and edges are
anti-aliased.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epd_ray.embedded.still_life.scenes import (
    ANY_SIZE,
    CANVAS,
    COLOURS,
    GROUNDS,
    MOST_THINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    Array,
    Scene,
    Thing,
)

HUE_SPREAD = 9.0  # largest difference in degrees between a thing's hue and the one that its colour names
OTHERS = (0.4, 0.4, 0.2)  # the shares of pictures with 0, 1 and 2 more things where their number is not told
LAYOUTS = 40  # how many random layouts are tried before things may become smaller, within their sizes


@dataclass(frozen=True)
class Drawn:
    """One thing of a picture.

    Attributes:
        told: its size (empty where it was not told), colour and shape.
        x, y: its centre in pixels from the left and from the top.
        radius: in pixels.
        angle: its rotation in radians.
        hue: in degrees.
    """

    told: Thing
    x: float
    y: float
    radius: float
    angle: float
    hue: float


@dataclass(frozen=True)
class Picture:
    """Everything that a picture shows.

    Attributes:
        things: from back to front.
        ground: one of GROUNDS.
        shades: the two colours of the ground [2, 3], RGB in [0, 1].
        turn: the direction of the ground's pattern in radians.
        period: of the pattern in pixels.
        light: the direction that the light comes from in radians.
        shading: by how much a thing's side away from the light is darker, in [0, 1].
        shadow: how dark the shadows are, in [0, 1].
        outline: the brightness of the outlines in [0, 1]; None draws none.
    """

    things: tuple[Drawn, ...]
    ground: str
    shades: Array
    turn: float
    period: float
    light: float
    shading: float
    shadow: float
    outline: float | None


def compose(scene: Scene, rng: np.random.Generator) -> Picture:
    """A random picture that the scene's caption describes: no thing beside the named ones could be taken for one."""
    named = [_filled(thing, scene.things, rng) for thing in scene.things]
    room = MOST_THINGS - len(named)
    others = min(room, int(rng.choice(len(OTHERS), p=OTHERS))) if scene.others is None else scene.others
    taken = {thing.colour for thing in named}
    extra: list[Thing] = []
    for _ in range(others):
        colours = [c for c in COLOURS if c not in taken and not _could_be_named(c, scene.things)]
        colours = colours or [c for c in COLOURS if c not in taken]
        thing = Thing("", _pick(colours, rng), _pick(SHAPES, rng))
        taken.add(thing.colour)
        extra.append(thing)
    front, back = _laid_out(named, extra, scene.relation, rng)
    ground = scene.background or _pick(GROUNDS, rng)
    brightness = rng.uniform(0.25, 0.95)
    contrast = rng.uniform(0.18, 0.32) * (-1 if brightness > 0.6 else 1)
    shade = [_rgb(rng.uniform(0, 360), rng.uniform(0.02, 0.22), b) for b in (brightness, brightness + contrast)]
    if ground == "plain":
        shade[1] = shade[0] + np.float32(rng.uniform(-0.12, 0.12))
    return Picture(
        things=(*back, *front),
        ground=ground,
        shades=np.clip(np.stack(shade), 0, 1),
        turn=float(rng.uniform(0, math.pi)),
        period=float(rng.uniform(8, 14)),
        light=float(rng.uniform(0, 2 * math.pi)),
        shading=float(rng.uniform(0, 0.45)),
        shadow=float(rng.uniform(0.15, 0.5)) if rng.random() < 0.7 else 0.0,
        outline=float(rng.choice([0.05, 0.95])) if rng.random() < 0.4 else None,
    )


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _filled(thing: Thing, named: Sequence[Thing], rng: np.random.Generator) -> Thing:
    """The named thing with a colour and a shape; a colour that is not told is none of another named thing."""
    told = {other.colour for other in named}
    colour = thing.colour or _pick([c for c in COLOURS if c not in told], rng)
    return Thing(thing.size, colour, thing.shape or _pick(SHAPES, rng))


def _could_be_named(colour: str, named: Sequence[Thing]) -> bool:
    return any(thing.colour == colour for thing in named)


def _laid_out(
    named: Sequence[Thing], extra: Sequence[Thing], relation: str, rng: np.random.Generator
) -> tuple[list[Drawn], list[Drawn]]:
    """The named and the other things with sizes and places: nothing covers a named thing, others may be covered."""
    things = [*named, *extra]
    shrink, count = 1.0, len(things)
    gaps = np.full((count, count), 0.85)
    gaps[: len(named), : len(named)] = 1.1
    np.fill_diagonal(gaps, 0)
    while True:
        ranges = np.array([SIZES.get(thing.size, ANY_SIZE) for thing in things])
        radii = np.maximum(rng.uniform(ranges[:, 0], ranges[:, 1]) * shrink, ranges[:, 0])
        for _ in range(LAYOUTS):
            margin = radii[:, None]
            places = rng.uniform(margin, CANVAS - margin, (count, 2))
            if relation in RELATIONS:
                direction = np.array(RELATIONS[relation])
                step = places[0] - places[1]
                along, across = float(step @ direction), float(abs(step @ direction[::-1]))
                if along < 1.2 * across:
                    continue
            apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
            if (apart >= gaps * (radii[:, None] + radii[None])).all():
                drawn = [
                    Drawn(
                        thing,
                        float(places[i, 0]),
                        float(places[i, 1]),
                        float(radii[i]),
                        float(rng.uniform(0, 2 * math.pi)),
                        COLOURS[thing.colour] + float(rng.uniform(-HUE_SPREAD, HUE_SPREAD)),
                    )
                    for i, thing in enumerate(things)
                ]
                return drawn[: len(named)], drawn[len(named) :]
        shrink *= 0.95


def _rgb(hue: float, saturation: float, value: float) -> Array:
    """HSV to RGB [3], float32; hue in degrees, the others in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


def facts(picture: Picture) -> Array:
    """Everything that a picture shows, as numbers of similar size, float32.

    Per colour the place, radius and shape of a thing, zeros where there is none; then the ground's kind, shades, turn
    and period, the light and the outline.
    """
    things = np.zeros((len(COLOURS), 4 + len(SHAPES)))
    for thing in picture.things:
        row = things[list(COLOURS).index(thing.told.colour)]
        row[:4] = 1, thing.x / CANVAS - 0.5, thing.y / CANVAS - 0.5, thing.radius / ANY_SIZE[1]
        row[4 + SHAPES.index(thing.told.shape)] = 1
    kind = np.eye(len(GROUNDS))[GROUNDS.index(picture.ground)]
    turns = 1.0 if picture.ground == "plain" else 4.0 if picture.ground != "striped" else 2.0  # the pattern's symmetry
    pattern = (math.cos(turns * picture.turn), math.sin(turns * picture.turn), picture.period / 10 - 1)
    light = (picture.shading * math.cos(picture.light), picture.shading * math.sin(picture.light), picture.shadow)
    outline = (0.0, 0.0) if picture.outline is None else (1.0, picture.outline)
    return np.concatenate([things.ravel(), kind, picture.shades.ravel(), pattern, light, outline]).astype(np.float32)


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> Array:
    """Draw a random picture of each of B scenes; returns images [B, 3, 64, 64], float32 in [0, 1]."""
    return draw([compose(scene, rng) for scene in scenes], rng)


def draw(pictures: Sequence[Picture], rng: np.random.Generator) -> Array:
    """Draw B pictures [B, 3, 64, 64], float32 in [0, 1]; the noise of the things' brightness comes from `rng`."""
    images = _grounds(pictures)
    for slot in range(MOST_THINGS):
        rows = np.array([i for i, p in enumerate(pictures) if len(p.things) > slot], np.intp)
        if len(rows):
            _add(images, rows, [pictures[i] for i in rows], [pictures[i].things[slot] for i in rows], rng)
    return np.clip(images, 0, 1)


def _column(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)[:, None, None]


_AXIS = np.arange(CANVAS, dtype=np.float32) + 0.5


def _grounds(pictures: Sequence[Picture]) -> Array:
    turn, period = _column([p.turn for p in pictures]), _column([p.period for p in pictures])
    x, y = _AXIS[None, None, :] - CANVAS / 2, _AXIS[None, :, None] - CANVAS / 2
    u = (np.cos(turn) * x + np.sin(turn) * y) / period
    v = (-np.sin(turn) * x + np.cos(turn) * y) / period
    mix = 0.5 + u * period / CANVAS  # plain: one shade goes over into the other
    kinds = np.array([GROUNDS.index(p.ground) for p in pictures])[:, None, None]
    edge = period / 2.5  # pixels of a pattern's blurred edges, as a factor
    stripes = np.clip(0.5 + edge * np.sin(2 * np.pi * u) / 2, 0, 1)
    centred = np.hypot(u - np.round(u), v - np.round(v))
    spots = np.clip(0.5 + period * (0.3 - centred), 0, 1)
    checks = np.clip(0.5 + edge * np.sin(np.pi * u) * np.sin(np.pi * v), 0, 1)
    for kind, pattern in (("striped", stripes), ("spotted", spots), ("checked", checks)):
        mix = np.where(kinds == GROUNDS.index(kind), pattern, mix)
    shades = np.stack([p.shades for p in pictures]).astype(np.float32)
    first, second = shades[:, 0, :, None, None], shades[:, 1, :, None, None]
    return np.asarray(first + mix[:, None].astype(np.float32) * (second - first), np.float32)


def _add(
    images: Array, rows: np.ndarray, pictures: Sequence[Picture], things: Sequence[Drawn], rng: np.random.Generator
) -> None:
    """Paint one thing, its shadow and its outline, onto each of the rows of images."""
    light = np.array([p.light for p in pictures], np.float32)
    centers = np.array([(t.x, t.y) for t in things], np.float32)
    radii = np.array([t.radius for t in things], np.float32)
    angles = np.array([t.angle for t in things], np.float32)
    shapes = [t.told.shape for t in things]
    away = -np.stack([np.cos(light), np.sin(light)], axis=1)
    shadow = _column([p.shadow for p in pictures])
    cast = np.clip(
        0.5 - distances(shapes, (centers + 2.5 * away).astype(np.float32), radii, angles) / 3, 0, 1
    )  # a blurred edge
    painted = images[rows] * (1 - shadow * cast)[:, None]
    distance = distances(shapes, centers, radii, angles)
    x, y = _AXIS[None, None, :] - centers[:, 0, None, None], _AXIS[None, :, None] - centers[:, 1, None, None]
    facing = (
        -(x * away[:, 0, None, None] + y * away[:, 1, None, None]) / radii[:, None, None]
    )  # -1 away, 1 to the light
    tones = _column([p.shading for p in pictures])
    bright = np.clip(1 + tones * (np.clip(facing, -1, 1) - 1) / 2, 0, 1)
    ink = np.stack([_rgb(t.hue, rng.uniform(0.8, 1.0), rng.uniform(0.75, 0.95)) for t in things])
    ink = ink[:, :, None, None] * bright[:, None]
    alpha = np.clip(0.5 - distance, 0, 1)[:, None]
    painted += alpha * (ink - painted)
    lines = _column([math.nan if p.outline is None else p.outline for p in pictures])
    rim = np.clip(1.2 - np.abs(distance - 0.8), 0, 1)[:, None] * ~np.isnan(lines)[:, None]
    painted += rim * (np.nan_to_num(lines)[:, None] - painted)
    images[rows] = painted


def distances(shapes: Sequence[str], centers: Array, radii: Array, angles: Array, side: int = CANVAS) -> Array:
    """Distances [B, side, side] of the pixels to B outlines, in pixels, negative inside.

    Args:
        shapes: B of SHAPES.
        centers: [B, 2], x and y in pixels.
        radii: [B], in pixels.
        angles: [B], the rotations in radians.
        side: the pixels of a side.
    """
    axis = np.arange(side, dtype=np.float32) + 0.5
    x, y = axis[None, None, :] - centers[:, 0, None, None], axis[None, :, None] - centers[:, 1, None, None]
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x
    found = np.empty(x.shape, np.float32)
    for shape in set(shapes):
        rows = [i for i, name in enumerate(shapes) if name == shape]
        found[rows] = _signed_distance(shape, x[rows], y[rows], radii[rows, None, None])
    return found


def _signed_distance(shape: str, x: Array, y: Array, r: Array) -> Array:
    """Distance to the outline in pixels, negative inside."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - 0.95 * r)
    if shape == "ring":
        return np.asarray(np.abs(np.hypot(x, y) - 0.75 * r) - 0.28 * r)
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
