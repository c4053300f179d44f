from collections import Counter
from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest

from epd_ray.embedded.still_life.damage import DAMAGES, damaged
from epd_ray.embedded.still_life.drawing import Drawn, Picture, compose, distances, draw, facts, render
from epd_ray.embedded.still_life.judge import look, scene_accuracy
from epd_ray.embedded.still_life.scenes import (
    CANVAS,
    COLOURS,
    GROUNDS,
    MIRRORED,
    MOST_THINGS,
    ONE_THING,
    RELATIONS,
    SHAPES,
    SIZES,
    Array,
    Scene,
    Split,
    Thing,
    altered,
    count_scenes,
    distinct_scenes,
    parse,
    random_scene,
    random_scenes,
)
from epd_ray.errors import PromptError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
RED, BLUE = Thing("small", "red", "circle"), Thing("large", "blue", "star")


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Scene], list[Picture], Array]:
    """Scenes, what was made of them, and their pictures."""
    rng = np.random.default_rng(1)
    scenes = list(islice(random_scenes(rng, "train"), 200))
    pictures = [compose(scene, rng) for scene in scenes]
    return scenes, pictures, draw(pictures, rng)


def drawn_by_hand(colour: tuple[float, float, float], left: int, top: int, width: int, height: int) -> Array:
    """A rectangle on white, without the renderer."""
    image = np.ones((3, CANVAS, CANVAS), np.float32)
    image[:, top : top + height, left : left + width] = np.array(colour, np.float32)[:, None, None]
    return image


# -- what captions tell -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene((Thing(),)), "a thing"),
        (Scene((Thing("", "red", "star"),), background="striped"), "a red star on a striped background"),
        (Scene((), others=3), "three things"),
        (Scene((), others=1, background="plain"), "one thing on a plain background"),
        (Scene((Thing("", "red"),), others=0), "a red thing alone"),
        (Scene((RED, BLUE), "left of", 1), "a small red circle left of a large blue star and one other thing"),
        (
            Scene((RED, BLUE), "left of", 1, "checked"),
            "a small red circle left of a large blue star and one other thing on a checked background",
        ),
    ],
)
def test_captions_tell_what_the_scene_tells(scene: Scene, caption: str) -> None:
    assert scene.caption == caption and parse(caption) == scene


def test_captions_are_short_and_read_back() -> None:
    rng = np.random.default_rng(8)
    scenes = [random_scene(rng, n) for n in (0, 1, 2) * 300]
    assert max(len(scene.caption.split()) for scene in scenes) <= 18
    assert all(parse(scene.caption) == scene for scene in scenes)
    for other in ("a tiny red circle", "one things", "two thing", "a red star and five other things", ""):
        assert parse(other) is None


def test_much_is_left_open() -> None:
    rng = np.random.default_rng(2)
    scenes = [random_scene(rng, 1) for _ in range(1000)]
    told = {name: np.mean([bool(getattr(s.things[0], name)) for s in scenes]) for name in ("size", "colour", "shape")}
    assert told == pytest.approx({"size": 0.25, "colour": 0.85, "shape": 0.9}, abs=0.05)
    assert np.mean([s.others is None for s in scenes]) == pytest.approx(0.65, abs=0.05)
    assert np.mean([not s.background for s in scenes]) == pytest.approx(0.5, abs=0.05)


def mirrored(scene: Scene) -> Scene:
    return replace(scene, things=scene.things[::-1], relation=MIRRORED[scene.relation])


def test_splits_are_disjoint_however_a_scene_is_told() -> None:
    rng = np.random.default_rng(9)
    scenes = [random_scene(rng, 2) for _ in range(3000)] + [Scene((RED, RED), "left of")]
    assert all(mirrored(scene).split == scene.split for scene in scenes)
    assert all(mirrored(scene).canonical() == scene.canonical() for scene in scenes)
    shares = Counter(scene.split for scene in scenes)
    assert 0.7 < shares["train"] / 3000 < 0.9 and min(shares.values()) > 0.05 * 3000
    captions: list[set[str]] = []
    for split in SPLITS:
        chosen = distinct_scenes(split, 200, seed=0, two_things=0.6)
        captions.append({told.caption for s in chosen for told in (s, mirrored(s) if len(s.things) == 2 else s)})
    assert all(not captions[i] & captions[j] for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_same_arguments_give_the_same_scenes_and_pictures() -> None:
    first = distinct_scenes("test", 60, seed=3, two_things=0.5)
    assert first == distinct_scenes("test", 60, seed=3, two_things=0.5)
    assert first != distinct_scenes("test", 60, seed=4, two_things=0.5)
    assert len({scene.canonical() for scene in first}) == 60
    images = render(first, np.random.default_rng(1))
    assert images.dtype == np.float32 and images.shape == (60, 3, CANVAS, CANVAS)
    assert images.min() >= 0 and images.max() <= 1
    assert np.array_equal(images, render(first, np.random.default_rng(1)))
    assert not np.array_equal(images, render(first, np.random.default_rng(2)))


@pytest.mark.parametrize("two_things", [0.0, 0.5, 1.0])
def test_more_scenes_than_there_are_is_an_error(two_things: float) -> None:
    there = count_scenes("validation", two_things)
    assert there == {0.0: 343, 0.5: 20_343, 1.0: 20_000}[two_things]
    with pytest.raises(PromptError, match=rf"{there + 1} validation scenes asked, {there} exist"):
        distinct_scenes("validation", there + 1, 0, two_things)


def test_as_many_scenes_as_are_said_to_exist_can_be_had() -> None:
    things = [Thing(*parts) for parts in product(("", *SIZES), ("", *COLOURS), ("", *SHAPES))]
    grounds = ("", *GROUNDS)
    scenes = [Scene((t,), "", others, g) for t in things for others in (None, 0, 1, 2) for g in grounds]
    scenes += [Scene((), others=number, background=g) for number in (1, 2, 3) for g in grounds]
    assert Counter(scene.split for scene in scenes) == ONE_THING
    every = distinct_scenes("test", ONE_THING["test"], 0, two_things=0.0)
    assert set(every) == {scene for scene in scenes if scene.split == "test"}


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_show_what_is_told_and_vary_in_the_rest(drawn: tuple[list[Scene], list[Picture], Array]) -> None:
    scenes, pictures, _ = drawn
    for scene, picture in zip(scenes, pictures, strict=True):
        things = picture.things
        assert 1 <= len(things) <= MOST_THINGS and (not scene.background or picture.ground == scene.background)
        assert scene.others is None or len(things) == len(scene.things) + scene.others
        for told, thing in zip(scene.things, things[len(things) - len(scene.things) :], strict=True):
            assert told.colour in ("", thing.told.colour) and told.shape in ("", thing.told.shape)
            low, high = SIZES.get(told.size, (7.0, 14.0))
            assert low <= thing.radius <= high
        assert all(t.radius <= t.x <= CANVAS - t.radius and t.radius <= t.y <= CANVAS - t.radius for t in things)
    assert {picture.ground for picture in pictures} == set(GROUNDS)
    assert {len(picture.things) for picture in pictures} == {1, 2, 3}
    same = [compose(scenes[0], np.random.default_rng(seed)) for seed in range(2)]
    assert not np.array_equal(same[0].shades, same[1].shades)


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_hold_for_the_largest_things(relation: str) -> None:
    scene = Scene((Thing("large", "red", "star"), Thing("large", "blue", "square")), relation, 1)
    rng = np.random.default_rng(0)
    right = RELATIONS[relation]
    for picture in (compose(scene, rng) for _ in range(20)):
        first, second = picture.things[-2:]
        step = np.array([first.x - second.x, first.y - second.y])
        assert step @ right > abs(step @ right[::-1])
        assert np.hypot(*step) >= 1.1 * (first.radius + second.radius) - 1e-9


@pytest.mark.parametrize(
    ("shape", "inside", "outside"),  # x, y from the centre at radius 13; y points down
    [
        ("circle", [(0, -11), (8, 8)], [(0, -14), (10, 10)]),
        ("ring", [(0, -11), (9, 0)], [(0, 0), (4, 4), (0, -14)]),
        ("square", [(9, 9), (-9, 9)], [(13, 0), (0, 13)]),
        ("triangle", [(0, -12), (10, 6), (-10, 6)], [(0, 9), (9, -6), (-9, -6)]),
        ("star", [(0, -12), (7, 10), (-7, 10), (12, -4)], [(0, 8), (8, -10), (8, 3)]),
        ("cross", [(12, 0), (0, 12), (3, -11)], [(7, 7), (-7, 7)]),
    ],
)
def test_outlines(shape: str, inside: list[tuple[int, int]], outside: list[tuple[int, int]]) -> None:
    centre, radius = np.full((1, 2), 32.5, np.float32), np.full(1, 13.0, np.float32)
    upright, turned = (distances([shape], centre, radius, np.full(1, a))[0] for a in (0.0, np.pi / 2))
    assert all(upright[32 + y, 32 + x] < -0.3 for x, y in inside)
    assert all(upright[32 + y, 32 + x] > 0.3 for x, y in outside)
    assert all(turned[32 + x, 32 - y] < -0.3 for x, y in inside)  # a quarter turn maps (x, y) to (-y, x)


def test_facts_tell_pictures_apart(drawn: tuple[list[Scene], list[Picture], Array]) -> None:
    _, pictures, _ = drawn
    thing = Drawn(RED, 16.0, 48.0, 14.0, 0.0, 0.0)
    table = facts(replace(pictures[0], things=(thing,)))[: len(COLOURS) * (4 + len(SHAPES))].reshape(len(COLOURS), -1)
    assert table[0].tolist() == [1, -0.25, 0.25, 1, 1, 0, 0, 0, 0, 0] and not table[1:].any()
    rows = {facts(picture).tobytes() for picture in pictures}
    assert len(rows) == len(pictures) and np.abs(np.stack([facts(p) for p in pictures])).max() <= 1.01


# -- the judge --------------------------------------------------------------------------------------------------------


def test_the_judge_accepts_true_pictures_and_no_others(drawn: tuple[list[Scene], list[Picture], Array]) -> None:
    scenes, _, images = drawn
    assert scene_accuracy(images, scenes).mean() >= 0.99
    rng = np.random.default_rng(3)
    others = [altered(scene, rng) for scene in scenes]
    judged = [i for i, other in enumerate(others) if replace(other, background="") != replace(scenes[i], background="")]
    assert len(judged) > 100
    assert scene_accuracy(images[judged], [others[i] for i in judged]).mean() <= 0.05


@pytest.mark.parametrize(("noise", "least", "most"), [(0.03, 0.9, 1.0), (0.6, 0.0, 0.2)])
def test_the_judge_survives_some_noise(
    drawn: tuple[list[Scene], list[Picture], Array], noise: float, least: float, most: float
) -> None:
    scenes, images = drawn[0][:30], drawn[2][:30]
    noisy = np.clip(images + noise * np.random.default_rng(5).standard_normal(images.shape), 0, 1).astype(np.float32)
    assert least <= scene_accuracy(noisy, scenes).mean() <= most


def test_the_judge_reads_pictures_of_other_origin() -> None:
    image = drawn_by_hand((0.9, 0.1, 0.1), 26, 26, 12, 12)
    (seen,) = look(image)
    assert seen.thing == Thing("small", "red", "square") and (seen.x, seen.y) == (32, 32) and seen.overlap > 0.95
    scenes = [
        Scene((Thing("", "red", "square"),), others=0),
        Scene((Thing("", "red", "circle"),)),
        Scene((Thing("", "blue", "square"),)),
        Scene((Thing("large", "", ""),)),
        Scene((), others=2),
        Scene((), others=1),
    ]
    assert scene_accuracy(np.stack([image] * 6), scenes).tolist() == [True, False, False, False, False, True]
    assert look(drawn_by_hand((0.9, 0.1, 0.1), 10, 28, 40, 6)) == []  # no shape of this world


def test_the_judge_wants_every_named_thing_and_the_relation() -> None:
    scene = Scene((RED, BLUE), "left of", 0, "plain")
    image = render([scene], np.random.default_rng(0))[0]
    blank, half = np.ones_like(image), image.copy()
    half[:, :, 32:] = 0.5
    assert scene_accuracy(np.stack([image, blank, half]), [scene] * 3).tolist() == [True, False, False]
    assert scene_accuracy(image[None], [mirrored(scene)]).all()  # the same picture told the other way round
    assert not scene_accuracy(image[None, :, :, ::-1], [scene]).any()


# -- damages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_changes_a_picture_and_leaves_it_in_range(
    drawn: tuple[list[Scene], list[Picture], Array], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, pictures, images = (part[:12] for part in drawn)
    monkeypatch.setattr("epd_ray.embedded.still_life.damage.DAMAGES", {kind: DAMAGES[kind]})
    worse, kinds = damaged(scenes, pictures, np.random.default_rng(0))
    assert worse.shape == images.shape and worse.dtype == np.float32 and set(kinds) == {kind}
    assert worse.min() >= 0 and worse.max() <= 1
    assert (np.abs(worse - images).max(axis=(1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("kind", ["missing thing", "wrong attribute", "faint thing"])
def test_damage_to_a_named_thing_is_seen_by_the_judge(kind: str) -> None:
    scenes = [Scene((Thing("", "red", "star"),), others=0)] * 20
    rng = np.random.default_rng(1)
    pictures = [compose(scene, rng) for scene in scenes]
    worse = np.stack([DAMAGES[kind](*pair, rng) for pair in zip(scenes, pictures, strict=True)])
    assert scene_accuracy(worse, scenes).mean() <= (0.5 if kind == "faint thing" else 0.0)
