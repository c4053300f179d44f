"""Splits prompts for training, validation and test; they are captions of scenes, built in, or from a file."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from epd_ray.embedded.scenes import Split, count_scenes, distinct_scenes
from epd_ray.errors import PromptError
from epd_ray.prompts.files import read_rows
from epd_ray.prompts.panel import Panel
from epd_ray.types import Metadata

SHAPES, BUILTIN = "shapes", "builtin"
"""Sources without a file: captions of the embedded model's scenes, and prompts that were written for this project."""

BUILTIN_FILES: dict[Split, Path] = {
    split: Path(__file__).parent / "builtin" / f"{split}.csv" for split in ("train", "validation", "test")
}
"""Files with the columns category and prompt. Categories alternate, so the first rows of a file contain all of them."""


@dataclass(frozen=True)
class BuiltinPrompt:
    """A prompt that comes with the package, and its category, such as "counts" or "relations"."""

    category: str
    prompt: str


@dataclass(frozen=True)
class PromptSplits:
    """Prompts for training, validation and test; no prompt is in two of the lists.

    Attributes:
        train: the prompts to learn from.
        validation: the prompts that choose the table.
        test: the prompts that results are reported on.
        rows: prompt -> the columns of its row that reward heads read; empty where no head reads a column.
    """

    train: list[str]
    validation: list[str]
    test: list[str]
    rows: Mapping[str, Metadata] = field(default_factory=dict)

    @property
    def splits(self) -> dict[Split, list[str]]:
        """The prompts by the name of the split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


class Wanted(Protocol):
    """The source of the prompts and the number of prompts per split, such as the section `prompts` of a configuration.

    Attributes:
        train: SHAPES, BUILTIN, or the path of a prompt file.
        num_train: number of training prompts; has no effect on a file, all of whose other prompts are for training.
        validation: number of validation prompts.
        test: number of test prompts.
        two_things: share of captions with two objects, in [0, 1]; only for SHAPES.
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


def load_prompts(wanted: Wanted, seed: int, panel: Panel | None = None) -> PromptSplits:
    """The prompts of a run; equal arguments give equal prompts.

    Args:
        wanted: the source, and the number of prompts of each split. Of a file's distinct prompts, the last `test` ones
            are for the test and the `validation` ones before them for validation.
        seed: seed with which scenes are drawn; it has no effect on prompts of a file and built-in prompts.
        panel: the reward heads, whose columns are read; None where nothing is scored.

    Raises:
        PromptError: a file cannot be used, the source has too few prompts, or a row lacks what `panel` requires.
    """
    found = _split(wanted, seed, panel or Panel({}))
    for split, prompts in found.splits.items():
        rows = (found.rows.get(prompt, {}) for prompt in prompts)
        (panel or Panel({})).require_use(rows, f"{split} prompts of {wanted.train}")
    return found


def _split(wanted: Wanted, seed: int, panel: Panel) -> PromptSplits:
    counts: dict[Split, int] = {"train": wanted.num_train, "validation": wanted.validation, "test": wanted.test}
    if wanted.train == SHAPES:
        if panel.columns:
            panel.require({}, f"prompts.train={SHAPES}, whose captions have no columns")
        train, validation, test = (_captions(s, count, seed, wanted.two_things) for s, count in counts.items())
        return PromptSplits(train, validation, test)
    if wanted.train == BUILTIN:
        chosen = {split: _first_builtin(split, count) for split, count in counts.items()}
        columns = {row.prompt: {"category": row.category} for rows in chosen.values() for row in rows}
        for row in columns.values() if panel.columns else ():
            panel.require(row, f"prompts.train={BUILTIN}, which has the column category alone")
        texts = {split: [row.prompt for row in rows] for split, rows in chosen.items()}
        return PromptSplits(texts["train"], texts["validation"], texts["test"], columns if panel.columns else {})
    read = read_rows(wanted.train, panel)
    prompts = list(dict.fromkeys(read.texts))  # a prompt that occurs twice would be in two splits
    held_out = wanted.validation + wanted.test
    if len(prompts) <= held_out:
        raise PromptError(
            f"{wanted.train} has {len(prompts)} distinct prompts, more than {held_out} are needed "
            "(lower prompts.validation and prompts.test, or add prompts)"
        )
    first_test = len(prompts) - wanted.test
    first_validation = len(prompts) - held_out
    parts = prompts[:first_validation], prompts[first_validation:first_test], prompts[first_test:]
    return PromptSplits(*parts, rows=read.rows)


def builtin_prompts(split: Split) -> list[BuiltinPrompt]:
    """All built-in prompts of a split: 432 for "train", 60 for "validation", 132 for "test".

    The 12 categories alternate. No prompt is in two splits.
    """
    with BUILTIN_FILES[split].open(encoding="utf-8", newline="") as file:
        return [BuiltinPrompt(row["category"], row["prompt"]) for row in csv.DictReader(file)]


def _first_builtin(split: Split, count: int) -> list[BuiltinPrompt]:
    prompts = builtin_prompts(split)
    if count > len(prompts):
        raise PromptError(f"{count} {split} prompts asked, {len(prompts)} are built in (ask for fewer, or give a file)")
    return prompts[:count]


def _captions(split: Split, count: int, seed: int, two_things: float) -> list[str]:
    available = count_scenes(split, two_things)
    if count > available:
        fix = "ask for fewer" if 0 < two_things < 1 else "ask for fewer, or set it to 0.5"
        raise PromptError(
            f"{count} {split} prompts asked, {available} scenes exist with prompts.two_things={two_things:g} ({fix})"
        )
    return [scene.caption for scene in distinct_scenes(split, count, seed, two_things)]
