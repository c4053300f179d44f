import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from epd_ray.embedded import training
from epd_ray.embedded.judge import look, scene_accuracy
from epd_ray.embedded.networks import load_part
from epd_ray.embedded.scenes import (
    CANVAS,
    COLOURS,
    MIRRORED,
    RELATIONS,
    SHAPES,
    Array,
    Scene,
    Split,
    Thing,
    altered,
    coverage,
    distinct_scenes,
    parse,
    random_scene,
    render,
)
from epd_ray.errors import PromptError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
RED, BLUE = Thing("small", "red", "circle"), Thing("large", "blue", "star")


def mirrored(scene: Scene) -> Scene:
    return Scene(scene.things[::-1], MIRRORED[scene.layout], scene.background)


def drawn_by_hand(colour: str, left: int, top: int, width: int, height: int) -> Array:
    """A rectangle on white, without the renderer."""
    image = np.ones((3, CANVAS, CANVAS), np.float32)
    image[:, top : top + height, left : left + width] = np.array(COLOURS[colour], np.float32)[:, None, None]
    return image


@pytest.mark.parametrize("split", SPLITS)
def test_judge_recognises_every_rendered_scene(split: Split) -> None:
    scenes = distinct_scenes(split, 150, seed=1, two_things=0.6)
    assert scene_accuracy(render(scenes, np.random.default_rng(2)), scenes).all()


def test_judge_refuses_altered_scenes() -> None:
    rng = np.random.default_rng(3)
    scenes = distinct_scenes("test", 200, seed=4, two_things=0.6)
    others = [altered(scene, rng) for scene in scenes]
    assert all(scene.canonical() != other.canonical() for scene, other in zip(scenes, others, strict=True))
    images = render(scenes, rng)
    assert scene_accuracy(images, others).mean() <= 0.01


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_judge_survives_noise(noise: float) -> None:
    rng = np.random.default_rng(5)
    scenes = distinct_scenes("validation", 150, seed=6, two_things=0.6)
    images = render(scenes, rng)
    noisy = np.clip(images + noise * rng.standard_normal(images.shape), 0, 1).astype(np.float32)
    assert scene_accuracy(noisy, scenes).mean() >= 0.97
    buried = np.clip(images + 0.6 * rng.standard_normal(images.shape), 0, 1).astype(np.float32)
    assert scene_accuracy(buried, scenes).mean() <= 0.3


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (drawn_by_hand("red", 26, 26, 12, 12), Scene((Thing("small", "red", "square"),), "in the center", "white")),
        (drawn_by_hand("blue", 38, 6, 21, 21), Scene((Thing("large", "blue", "square"),), "at the top right", "white")),
    ],
)
def test_judge_reads_pictures_of_other_origin(image: Array, expected: Scene) -> None:
    wrong = [replace(expected, background="gray"), replace(expected, layout="at the bottom")]
    wrong += [replace(expected, things=(replace(expected.things[0], colour="green"),))]
    assert scene_accuracy(np.stack([image] * 4), [expected, *wrong]).tolist() == [True, False, False, False]


def test_judge_wants_the_whole_scene_and_nothing_more() -> None:
    scene = Scene((RED, BLUE), "left of", "white")
    image = render([scene], np.random.default_rng(0))[0]
    blank, extra, half = np.ones_like(image), image.copy(), image.copy()
    extra[:, 2:12, 28:38] = np.array(COLOURS["green"], np.float32)[:, None, None]
    half[:, :, 32:] = 1
    assert scene_accuracy(np.stack([image, blank, extra, half]), [scene] * 4).tolist() == [True, False, False, False]
    assert scene_accuracy(image[None], [mirrored(scene)]).all()  # the same picture told the other way round
    assert not scene_accuracy(image[None, :, :, ::-1], [scene]).any()
    long = drawn_by_hand("red", 10, 28, 40, 6)  # no shape of this world
    assert look(long) is None


def test_captions_are_short_distinct_and_read_back() -> None:
    rng = np.random.default_rng(8)
    scenes = [random_scene(rng, n) for n in (1, 2) * 300]
    assert max(len(scene.caption.split()) for scene in scenes) <= 15
    assert all(parse(scene.caption) == scene for scene in scenes)
    assert parse("a tiny red circle in the center on a white background") is None
    assert Scene((RED, BLUE), "left of", "gray").caption == (
        "a small red circle left of a large blue star on a gray background"
    )


def test_splits_are_disjoint_however_a_scene_is_told() -> None:
    rng = np.random.default_rng(9)
    scenes = [random_scene(rng, 2) for _ in range(3000)]
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
    assert len({scene.canonical() for scene in first}) == 60 and {len(s.things) for s in first} == {1, 2}
    images = render(first, np.random.default_rng(1))
    assert images.dtype == np.float32 and images.shape == (60, 3, CANVAS, CANVAS)
    assert images.min() >= 0 and images.max() <= 1
    assert np.array_equal(images, render(first, np.random.default_rng(1)))
    assert not np.array_equal(images, render(first, np.random.default_rng(2)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relation", RELATIONS)
def test_the_largest_things_stay_apart_and_on_the_canvas(shape: str, relation: str) -> None:
    scene = Scene((Thing("large", "red", shape), Thing("large", "blue", shape)), relation, "black")
    images = render([scene] * 20, np.random.default_rng(0))
    assert all((found := look(image)) is not None and len(found[1]) == 2 for image in images)
    border = np.concatenate([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], axis=-1)
    assert (border.max(axis=1) > 0.5).mean() < 0.01  # a tip may touch the edge


@pytest.mark.parametrize(
    ("shape", "inside", "outside"),  # x, y from the centre at radius 13; y points down
    [
        ("circle", [(0, -11), (8, 8)], [(0, -14), (10, 10)]),
        ("square", [(9, 9), (-9, 9)], [(13, 0), (0, 13)]),
        ("triangle", [(0, -12), (10, 6), (-10, 6)], [(0, 9), (9, -6), (-9, -6)]),
        ("star", [(0, -12), (7, 10), (-7, 10), (12, -4)], [(0, 8), (8, -10), (8, 3)]),
        ("cross", [(12, 0), (0, 12), (3, -11)], [(7, 7), (-7, 7)]),
    ],
)
def test_outlines(shape: str, inside: list[tuple[int, int]], outside: list[tuple[int, int]]) -> None:
    ink = coverage(shape, np.full((1, 2), 32.5, np.float32), np.full(1, 13.0, np.float32))[0]
    assert [ink[32 + y, 32 + x] for x, y in inside] == [1.0] * len(inside)
    assert [ink[32 + y, 32 + x] for x, y in outside] == [0.0] * len(outside)


def test_a_stage_that_is_interrupted_ends_with_the_weights_of_one_that_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    data = torch.randn(20, 4, 2, generator=torch.Generator().manual_seed(0))

    def run(folder, end=None):
        torch.manual_seed(0)
        linear = torch.nn.Linear(2, 1)
        adam = torch.optim.AdamW(linear.parameters(), lr=0.1)

        def loss(step):
            if step == end:
                raise KeyboardInterrupt
            return linear(data[step]).square().mean()

        stage = training.Stage("one", linear, [adam], loss, warmup=3)
        folder.mkdir(exist_ok=True)
        training.run_stage(stage, folder, 20, rank=0, world_size=1)
        return stage

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", end=12)
    assert json.loads((tmp_path / "parts/one.json").read_text())["step"] == 12
    seconds = torch.load(tmp_path / "parts/one.pt", weights_only=True)["seconds"]
    resumed = run(tmp_path / "parts")
    assert 0 < seconds < resumed.elapsed  # which counts the seconds before the interruption too
    assert resumed.step == 20 and 0 < resumed.optimizers[0].param_groups[0]["lr"] < 0.1 / 3
    assert torch.equal(resumed.module.weight, whole.module.weight)
    assert torch.equal(resumed.ema["weight"], whole.ema["weight"])


@pytest.mark.parametrize(("two_things", "there"), [(0.0, 155), (0.5, 2310), (1.0, 2155)])
def test_more_scenes_than_there_are_is_an_error(two_things, there):
    with pytest.raises(PromptError, match=rf"{there + 1} validation scenes asked, {there} exist"):
        distinct_scenes("validation", there + 1, 0, two_things)


def test_a_part_of_a_checkpoint_is_loaded_whole_or_not_at_all(tmp_path):
    whole = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 1), "reader": torch.nn.Linear(1, 1)})
    torch.save({"ema": {name: torch.full_like(p, 3.0) for name, p in whole.named_parameters()}}, tmp_path / "one.pt")
    part = load_part("net", torch.nn.Linear(2, 1), tmp_path / "one.pt")
    assert part.weight.unique().item() == part.bias.unique().item() == 3.0
    with pytest.raises(ValueError, match=r"one.pt lacks other.bias and 1 more"):
        load_part("other", torch.nn.Linear(2, 1), tmp_path / "one.pt")
    with pytest.raises(FileNotFoundError, match="run the two stage"):
        load_part("net", torch.nn.Linear(2, 1), tmp_path / "two.pt")
