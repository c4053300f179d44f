import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import get_args

import pytest

from epd_ray.config.sections import PromptsConfig
from epd_ray.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    ONE_THING,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TWO_THINGS,
    Scene,
    Split,
    Thing,
)
from epd_ray.errors import PromptError
from epd_ray.prompts.splits import BUILTIN, builtin_prompts, load_prompts


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


@pytest.mark.parametrize(
    ("two_things", "test", "fix"),
    [(0.0, 174, "fewer, or set it to 0.5"), (1.0, 2125, "fewer, or set it to 0.5"), (0.5, 2298, "fewer")],
)
def test_more_scenes_than_there_are(two_things, test, fix):
    said = rf"{test} test prompts asked, {test - 1} scenes exist with prompts.two_things=\S+ \(ask for {fix}\)"
    with pytest.raises(PromptError, match=said):
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


SPLITS = get_args(Split)
SMALL = "a an and as at by for from in into is it its of on one over that the to two under with"


def words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", prompt.lower())) - set(SMALL.split())


def overlap(a: set[str], b: set[str]) -> float:
    """Share of the smaller set's words that the other has too."""
    return len(a & b) / min(len(a), len(b))


def test_builtin_prompts_are_many_and_of_natural_length() -> None:
    prompts = [row.prompt for split in SPLITS for row in builtin_prompts(split)]
    assert [len(builtin_prompts(split)) for split in SPLITS] == [432, 60, 132]
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts) == 624
    lengths = [len(prompt.split()) for prompt in prompts]
    assert min(lengths) >= 5 and max(lengths) <= 40
    assert sum(length > 20 for length in lengths) >= 40
    assert len(set().union(*map(words, prompts))) > 2000, "few different words"
    assert all(prompt == prompt.strip() and "\n" not in prompt and prompt.isprintable() for prompt in prompts)


def test_builtin_categories_are_balanced_and_take_turns() -> None:
    counts = {split: Counter(row.category for row in builtin_prompts(split)) for split in SPLITS}
    assert len(counts["train"]) == 12
    for split, each in (("train", 36), ("validation", 5), ("test", 11)):
        assert set(counts[split].values()) == {each} and counts[split].keys() == counts["train"].keys()
        assert len({row.category for row in builtin_prompts(split)[:12]}) == 12


def test_builtin_held_out_prompts_are_no_copies() -> None:
    train = [words(row.prompt) for row in builtin_prompts("train")]
    held_out = [row.prompt for split in ("validation", "test") for row in builtin_prompts(split)]
    nearest = [max(overlap(words(prompt), other) for other in train) for prompt in held_out]
    assert max(nearest) <= 0.6  # measured; two prompts about the same scene have more than 0.8
    assert sum(nearest) / len(nearest) < 0.35
    copy = words("Three pears and a plum on a round blue plate")
    assert max(overlap(copy, other) for other in train) > 0.6, "the measure sees no copy"


def test_builtin_prompts_can_be_chosen() -> None:
    splits = load_prompts(PromptsConfig.model_construct(train=BUILTIN, num_train=256, validation=48, test=128), seed=3)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (256, 48, 128)
    assert not set(splits.train) & {*splits.validation, *splits.test}
    assert splits.test == [row.prompt for row in builtin_prompts("test")][:128]
    with pytest.raises(PromptError, match=r"433 .*432 "):
        load_prompts(PromptsConfig.model_construct(train=BUILTIN, num_train=433, validation=1, test=1), seed=0)
