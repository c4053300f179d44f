"""Reads prompts from text files and tables. Wrong files raise an error that names the line."""

from collections.abc import Iterator
from pathlib import Path

from epd_ray.errors import PromptError
from epd_ray.prompts.tables import TABLE_SUFFIXES, pick_column, table_rows
from epd_ray.prompts.text import lines

SUFFIXES = (".txt", *TABLE_SUFFIXES)
"""The file name endings that `read_prompts` knows. A file without any is read as text, one with another is refused."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file in their order, duplicates included.

    Args:
        path: a .csv or .tsv file with a header (such as COCO's caption files and PartiPrompts), a .parquet or .jsonl
            file, each with a column in COLUMNS; a .json file with a list of texts or objects, or COCO's annotations; a
            .txt file, or one without an ending, with one prompt per line.

    Raises:
        PromptError: the file is missing, empty, of another kind or encoding, has no column of prompts, or holds a blank
            prompt.
    """
    path = Path(path)
    if path.is_dir():
        raise PromptError(f"{path} is a directory, expected a file: {', '.join(SUFFIXES)}")
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        raise PromptError(f"{path} is of a kind that is not read, expected {', '.join(SUFFIXES)}")
    try:
        found = [(place, text.strip()) for place, text in _prompts(path)]
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path}: {error.strerror or error}") from error
    if not found:
        raise PromptError(f"{path} is empty, expected at least one prompt")
    if blank := [place for place, prompt in found if not prompt]:
        raise PromptError(f"{path}, {blank[0]}: blank, expected a prompt ({len(blank)} blank in all; remove them)")
    return [prompt for _, prompt in found]


def _prompts(path: Path) -> Iterator[tuple[str, str]]:
    """The place and text of each prompt."""
    if path.suffix.lower() in TABLE_SUFFIXES:
        for place, texts in table_rows(path, lambda names, where: [pick_column(names, where)]):
            yield place, texts[0] if texts else ""
    else:
        yield from ((f"line {number}", line) for number, line in lines(path))
