"""The scenes of the embedded models: what a caption tells of a picture, and which captions are held out.

A picture shows one to three things on a ground. Its caption names one or two of them, or only how many there are, and
it may leave out any attribute. Everything that it leaves open is drawn at random (`drawing.py`), so that one caption
has many different pictures, and a sampler has to decide between them.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from epd_ray.errors import PromptError
from epd_ray.randomness import Purpose, stream

CANVAS = 64
Split = Literal["train", "validation", "test"]
Array = npt.NDArray[np.float32]

SIZES: dict[str, tuple[float, float]] = {"small": (7.0, 8.5), "large": (11.5, 14.0)}  # range of the radius in pixels
ANY_SIZE = (7.0, 14.0)  # range of the radius of a thing whose size is not told, in pixels
COLOURS: dict[str, float] = {"red": 0.0, "orange": 28.0, "yellow": 54.0, "green": 125.0, "blue": 225.0, "purple": 285.0}
"""The hue of each colour in degrees."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
GROUNDS = ("plain", "striped", "spotted", "checked")
RELATIONS: dict[str, tuple[int, int]] = {  # direction from the second thing to the first
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "and": "and"}
NUMBERS = ("no", "one", "two", "three")
MOST_THINGS = 3

WORDS = {
    *("a", "and", "on", "background", "thing", "things", "other", "alone"),
    *(w for text in (*SIZES, *COLOURS, *SHAPES, *GROUNDS, *RELATIONS, *NUMBERS[1:]) for w in text.split()),
}
"""The words of the captions."""

TOLD = {"size": 0.25, "colour": 0.85, "shape": 0.9, "relation": 0.6, "others": 0.35, "background": 0.5}
"""The share of random scenes that tell each attribute."""
ONLY_COUNTED = 0.1  # share of the scenes without a second named thing that name no thing at all
ONE_THING: dict[Split, int] = {"train": 2_324, "validation": 343, "test": 288}
TWO_THINGS: dict[Split, int] = {"train": 160_000, "validation": 20_000, "test": 20_000}
"""How many different scenes there are that name at most one thing, and how many with two named things can be had: about
four times as many exist, but the rarest would take minutes to find."""


@dataclass(frozen=True, order=True)
class Thing:
    """What is told of one thing, such as "small red circle"; an empty text is an attribute that is not told."""

    size: str = ""
    colour: str = ""
    shape: str = ""

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape or "thing") if word)


@dataclass(frozen=True)
class Scene:
    """What a caption tells of a picture.

    Attributes:
        things: the named things, at most two.
        relation: "and" or a key of RELATIONS between two named things, else empty.
        others: the number of things beside the named ones; None where it is not told.
        background: one of GROUNDS, or empty where it is not told.
    """

    things: tuple[Thing, ...]
    relation: str = ""
    others: int | None = None
    background: str = ""

    @property
    def caption(self) -> str:
        """The text that describes the scene in training and in prompts, at most 18 words."""
        ground = f" on a {self.background} background" if self.background else ""
        if not self.things:
            return f"{NUMBERS[self.others or 1]} thing{'s' * (self.others != 1)}{ground}"
        named = f" {self.relation} ".join(f"a {thing}" for thing in self.things)
        if self.others is None:
            return named + ground
        rest = f" and {NUMBERS[self.others]} other thing{'s' * (self.others > 1)}" if self.others else " alone"
        return named + rest + ground

    def canonical(self) -> "Scene":
        """The same scene with its things in sorted order, so that "A above B" and "B below A" are equal."""
        if len(self.things) < 2:
            return self
        first, second = self.things
        mirrored = MIRRORED[self.relation]
        swap = (second, mirrored) < (first, self.relation)
        return replace(self, things=(second, first), relation=mirrored) if swap else self

    @property
    def split(self) -> Split:
        """The split, which a hash of the canonical caption determines: 80 % train, 10 % validation, 10 % test.

        "A above B" and "B below A" are therefore in the same split.
        """
        tenth = zlib.crc32(self.canonical().caption.encode()) % 10
        return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def parse(caption: str) -> Scene | None:
    """The scene that a caption tells, or None when the text is not a caption of such a scene."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        return None
    found = match.groupdict(default="")
    if found["count"]:
        return Scene((), others=NUMBERS.index(found["count"].split()[0]), background=found["background"])
    things = [Thing(*(found[f"{attribute}{i}"] for attribute in ("size", "colour", "shape"))) for i in (1, 2)]
    named = tuple(replace(thing, shape=thing.shape.replace("thing", "")) for thing in things if thing.shape)
    rest = found["rest"]
    others = None if not rest else 0 if rest == " alone" else NUMBERS.index(rest.split()[1])
    return Scene(named, found["relation"], others, found["background"])


def _caption_pattern() -> re.Pattern[str]:
    def one_of(words: Iterable[str]) -> str:
        return "|".join(words)

    def thing(i: int) -> str:
        size, colour = rf"(?:(?P<size{i}>{one_of(SIZES)}) )?", rf"(?:(?P<colour{i}>{one_of(COLOURS)}) )?"
        return f"a {size}{colour}(?P<shape{i}>{one_of(SHAPES)}|thing)"

    named = f"{thing(1)}(?: (?P<relation>and|{one_of(RELATIONS)}) {thing(2)})?"
    rest = f"(?P<rest> alone| and one other thing| and (?:{one_of(NUMBERS[2:])}) other things)?"
    counted = f"(?P<count>one thing|(?:{one_of(NUMBERS[2:])}) things)"
    return re.compile(f"(?:{counted}|{named}{rest})(?: on a (?P<background>{one_of(GROUNDS)}) background)?")


_CAPTION = _caption_pattern()


def random_scene(rng: np.random.Generator, num_things: int) -> Scene:
    """A random scene that names this number of things, 0 to 2."""

    def pick(options: Iterable[str], share: float = 1.0) -> str:
        chosen = tuple(options)
        return chosen[int(rng.integers(len(chosen)))] if rng.random() < share else ""

    def thing() -> Thing:
        return Thing(pick(SIZES, TOLD["size"]), pick(COLOURS, TOLD["colour"]), pick(SHAPES, TOLD["shape"]))

    ground = pick(GROUNDS, TOLD["background"])
    if num_things == 0:
        return Scene((), others=int(rng.integers(1, MOST_THINGS + 1)), background=ground)
    others = int(rng.integers(MOST_THINGS + 1 - num_things)) if rng.random() < TOLD["others"] else None
    if num_things == 1:
        return Scene((thing(),), "", others, ground)
    return Scene((thing(), thing()), pick(RELATIONS, TOLD["relation"]) or "and", others, ground)


def random_scenes(rng: np.random.Generator, split: Split, two_things: float = 0.5) -> Iterator[Scene]:
    """An endless sequence of random scenes of one split; `two_things` in [0, 1] is the share that names two things."""
    while True:
        named = 2 if rng.random() < two_things else int(rng.random() >= ONLY_COUNTED)
        scene = random_scene(rng, named)
        if scene.split == split:
            yield scene


def count_scenes(split: Split, two_things: float) -> int:
    """The number of different scenes of a split, of which the share `two_things` in [0, 1] names two things."""
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
    """The scene with one told attribute changed, so that no picture fits both: a hard negative for training."""

    def other(options: Iterable[str], current: str) -> str:
        rest = [o for o in options if o != current]
        return rest[int(rng.integers(len(rest)))]

    changes: list[Scene] = []
    if scene.background:
        changes.append(replace(scene, background=other(GROUNDS, scene.background)))
    if scene.others is not None:
        numbers = range(1 if not scene.things else 0, MOST_THINGS + 1 - len(scene.things))
        changes.append(replace(scene, others=int(other([str(n) for n in numbers], str(scene.others)))))
    if scene.relation in RELATIONS:
        changes.append(replace(scene, relation=MIRRORED[scene.relation]))
    for i, thing in enumerate(scene.things):
        for attribute, options in {"size": (*SIZES,), "colour": (*COLOURS,), "shape": SHAPES}.items():
            if told := getattr(thing, attribute):
                changed = replace(thing, **{attribute: other(options, told)})
                changes.append(replace(scene, things=(*scene.things[:i], changed, *scene.things[i + 1 :])))
    if len(scene.things) == 2 and all(thing.colour for thing in scene.things):  # the two things exchange their colours
        first, second = scene.things
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        changes.append(replace(scene, things=swapped))
    changes = [change for change in changes if change.canonical() != scene.canonical()]
    return changes[int(rng.integers(len(changes)))] if changes else scene
