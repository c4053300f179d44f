"""Training prompts and held-out ones: of the embedded model's world, written for this project, or from a file."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from epd_ray.embedded.scenes import Split, distinct_scenes
from epd_ray.errors import PromptError
from epd_ray.prompts.files import read_prompts

SHAPES, BUILTIN = "shapes", "builtin"
"""Sources that need no file: captions of the embedded model's world, and prompts written for this project."""

ONE_THING: dict[Split, int] = {"train": 1292, "validation": 155, "test": 173}  # how many scenes there are
TWO_THINGS: dict[Split, int] = {"train": 16961, "validation": 2155, "test": 2124}

BUILTIN_FILES: dict[Split, Path] = {
    split: Path(__file__).parent / "builtin" / f"{split}.csv" for split in ("train", "validation", "test")
}
"""Columns category and prompt; the categories take turns, so that the first n rows of a split hold all of them."""


@dataclass(frozen=True)
class BuiltinPrompt:
    """A prompt that comes with the package, and what it tries."""

    category: str
    prompt: str


@dataclass(frozen=True)
class PromptSplits:
    """Three lists that share no prompt."""

    train: list[str]
    validation: list[str]
    test: list[str]


class Wanted(Protocol):
    """Where prompts come from and how many of each split are wanted; the section `prompts` of a configuration is one.

    Attributes:
        train: SHAPES, BUILTIN, or the path of a file.
        num_train: number of training prompts; a file gives all that it holds.
        validation: number of validation prompts.
        test: number of test prompts.
        two_things: share of SHAPES captions with two objects, in [0, 1].
    """

    @property
    def train(self) -> str: ...
    @property
    def num_train(self) -> int: ...
    @property
    def validation(self) -> int: ...
    @property
    def test(self) -> int: ...
    @property
    def two_things(self) -> float: ...


def load_prompts(wanted: Wanted, seed: int) -> PromptSplits:
    """The prompts of a run; the same ones for the same arguments.

    Args:
        wanted: the source and the number of prompts of each split. The last distinct prompts of a file are held out,
            those for validation before those for the test.
        seed: of the scenes; a file's order is its own, as is that of the built-in prompts.

    Raises:
        PromptError: a file that cannot be used, or fewer prompts than are asked for.
    """
    if wanted.train == SHAPES:
        return PromptSplits(
            train=_captions("train", wanted.num_train, seed, wanted.two_things),
            validation=_captions("validation", wanted.validation, seed, wanted.two_things),
            test=_captions("test", wanted.test, seed, wanted.two_things),
        )
    if wanted.train == BUILTIN:
        return PromptSplits(
            train=_first("train", wanted.num_train),
            validation=_first("validation", wanted.validation),
            test=_first("test", wanted.test),
        )
    prompts = list(dict.fromkeys(read_prompts(wanted.train)))  # a prompt in two places would leak into the test
    held_out = wanted.validation + wanted.test
    if len(prompts) <= held_out:
        raise PromptError(
            f"{wanted.train} has {len(prompts)} distinct prompts, more than {held_out} are needed "
            "(lower prompts.validation and prompts.test, or add prompts)"
        )
    first_test = len(prompts) - wanted.test
    first_validation = len(prompts) - held_out
    return PromptSplits(prompts[:first_validation], prompts[first_validation:first_test], prompts[first_test:])


def builtin_prompts(split: Split) -> list[BuiltinPrompt]:
    """All prompts of a split that come with the package, each category in turn.

    Args:
        split: train, validation or test; no prompt is in two of them.

    Returns:
        432, 60 or 132 prompts of 12 categories.
    """
    with BUILTIN_FILES[split].open(encoding="utf-8", newline="") as file:
        return [BuiltinPrompt(row["category"], row["prompt"]) for row in csv.DictReader(file)]


def _first(split: Split, count: int) -> list[str]:
    prompts = [row.prompt for row in builtin_prompts(split)]
    if count > len(prompts):
        raise PromptError(f"{count} {split} prompts asked, {len(prompts)} are built in (ask for fewer, or give a file)")
    return prompts[:count]


def _captions(split: Split, count: int, seed: int, two_things: float) -> list[str]:
    available = (ONE_THING[split] if two_things < 1 else 0) + (TWO_THINGS[split] if two_things > 0 else 0)
    if count > available:
        fix = "ask for fewer" if 0 < two_things < 1 else "ask for fewer, or set it to 0.5"
        raise PromptError(
            f"{count} {split} prompts asked, {available} scenes exist with prompts.two_things={two_things:g} ({fix})"
        )
    return [scene.caption for scene in distinct_scenes(split, count, seed, two_things)]
