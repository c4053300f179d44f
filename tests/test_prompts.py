from itertools import combinations, product
from pathlib import Path
from typing import get_args

import pytest

from epd_ray.config import PromptsConfig
from epd_ray.errors import PromptError
from epd_ray.prompts import ONE_THING, TWO_THINGS, load_prompts
from epd_ray.shapes.scenes import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Scene, Split, Thing


def prompt_file(folder: Path, content: str | bytes) -> str:
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_shapes_splits_are_apart_and_repeatable():
    config = PromptsConfig(num_train=200, validation=40, test=60)
    splits = load_prompts(config, seed=1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (200, 40, 60)
    assert len({*splits.train, *splits.validation, *splits.test}) == 300
    assert load_prompts(config, seed=1) == splits
    assert load_prompts(config, seed=2) != splits


def test_scene_counts():
    things = [Thing(*parts) for parts in product(SIZES, COLOURS, SHAPES)]
    one = [Scene((thing,), *rest).split for thing in things for rest in product(PLACES, BACKGROUNDS)]
    two = [
        Scene(tuple(sorted(pair)), *rest).split
        for pair in combinations(things, 2)
        for rest in product(RELATIONS, BACKGROUNDS)
    ]
    for split in get_args(Split):
        assert (one.count(split), two.count(split)) == (ONE_THING[split], TWO_THINGS[split])


@pytest.mark.parametrize(("two_things", "test"), [(0.0, 174), (1.0, 2125), (0.5, 2298)])
def test_more_scenes_than_there_are(two_things, test):
    with pytest.raises(PromptError, match=rf"{test} test prompts asked, {test - 1} scenes exist"):
        load_prompts(PromptsConfig(num_train=1, test=test, two_things=two_things), seed=0)


def test_all_one_object_scenes_can_be_had():
    splits = load_prompts(PromptsConfig(num_train=1, validation=1, test=173, two_things=0), seed=0)
    assert len(set(splits.test)) == 173


def test_a_files_end_is_held_out(tmp_path):
    path = prompt_file(tmp_path, "".join(f"prompt {i}\n" for i in range(10)))
    splits = load_prompts(PromptsConfig(train=path, validation=2, test=3), seed=5)
    assert splits.train == [f"prompt {i}" for i in range(5)]
    assert splits.validation == ["prompt 5", "prompt 6"]
    assert splits.test == ["prompt 7", "prompt 8", "prompt 9"]


def test_a_prompt_given_twice_is_in_one_split(tmp_path):
    path = prompt_file(tmp_path, "a\nb\nc\nd\na\n")
    splits = load_prompts(PromptsConfig(train=path, validation=1, test=1), seed=0)
    assert (splits.train, splits.validation, splits.test) == (["a", "b"], ["c"], ["d"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("a\n\nb\n", "line 2: blank"),
        (b"a\nb\xff\n", "line 2: not UTF-8"),
        ("a\nb\nb\n", "has 2 distinct prompts, more than 2 are needed"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, said):
    path = prompt_file(tmp_path, content)
    with pytest.raises(PromptError, match=said) as raised:
        load_prompts(PromptsConfig(train=path, validation=1, test=1), seed=0)
    assert "\n" not in str(raised.value)
