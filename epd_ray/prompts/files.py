"""Reads prompts from text files and tables. Wrong files raise an error that names the line."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from epd_ray.errors import PromptError, shown
from epd_ray.prompts.panel import SETTING, Panel
from epd_ray.prompts.tables import TABLE_SUFFIXES, Row, pick_column, table_rows
from epd_ray.prompts.text import lines
from epd_ray.types import Metadata

SUFFIXES = (".txt", *TABLE_SUFFIXES)
"""The file name endings that `read_prompts` knows. A file without any is read as text, one with another is refused."""


@dataclass(frozen=True)
class Prompts:
    """Prompts, and the columns of their rows that reward heads read.

    Attributes:
        texts: the prompts in their order.
        rows: prompt -> the columns of its row; empty where no head reads a column.
    """

    texts: list[str]
    rows: Mapping[str, Metadata] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file in their order, duplicates included; see `read_rows`."""
    return [row.texts[0] for row in _read(Path(path), ())]


def read_rows(path: str | Path, panel: Panel) -> Prompts:
    """The prompts of a file in their order, duplicates included, with the columns that reward heads read.

    Args:
        path: a .csv or .tsv file with a header (such as COCO's caption files and PartiPrompts), a .parquet or .jsonl
            file, each with a column in COLUMNS; a .json file with a list of texts or objects, or COCO's annotations; a
            .txt file, or one without an ending, with one prompt per line.
        panel: the heads.

    Raises:
        PromptError: the file is missing, empty, of another kind or encoding, has no column of prompts, or holds a blank
            prompt; or a row lacks what `panel` requires, or differs from another one of the same prompt.
    """
    path = Path(path)
    found = _read(path, panel.columns)
    texts = [row.texts[0] for row in found]
    if not panel.columns:
        return Prompts(texts)
    if panel.column is not None and not any(panel.column in row.columns for row in found):
        raise PromptError(
            f"{path} has no column {panel.column!r}, which {SETTING} names: add it, or change the setting"
        )
    first: dict[str, Row] = {}
    for row in found:
        where = f"{path}, {row.place}"
        panel.require(row.columns, where)
        earlier = first.setdefault(row.texts[0], row)
        for name in panel.columns:
            if earlier.columns.get(name) != row.columns.get(name):
                same = f"the prompt {shown(row.texts[0])} stands in {earlier.place} too, with another {name!r}"
                raise PromptError(f"{where}: {same}: make the prompts or the cells agree")
    return Prompts(texts, {prompt: row.columns for prompt, row in first.items()})


def _read(path: Path, further: Sequence[str]) -> list[Row]:
    if path.is_dir():
        raise PromptError(f"{path} is a directory, expected a file: {', '.join(SUFFIXES)}")
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        raise PromptError(f"{path} is of a kind that is not read, expected {', '.join(SUFFIXES)}")
    try:
        found = list(_prompts(path, further))
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path}: {error.strerror or error}") from error
    if not found:
        raise PromptError(f"{path} is empty, expected at least one prompt")
    if blank := [row.place for row in found if not row.texts[0]]:
        raise PromptError(f"{path}, {blank[0]}: blank, expected a prompt ({len(blank)} blank in all; remove them)")
    return found


def _prompts(path: Path, further: Sequence[str]) -> Iterator[Row]:
    """The rows, each with its prompt as its only text."""
    if path.suffix.lower() in TABLE_SUFFIXES:
        for row in table_rows(path, lambda names, where: [pick_column(names, where)], further):
            yield Row(row.place, ["".join(row.texts).strip()], row.columns)
    else:
        yield from (Row(f"line {number}", [line.strip()]) for number, line in lines(path))
