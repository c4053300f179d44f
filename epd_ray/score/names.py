"""Tables that give pictures their prompts by the names of their files."""

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from epd_ray.errors import PromptError, shown
from epd_ray.prompts.tables import TABLE_SUFFIXES, find_column, listed, pick_column, table_rows
from epd_ray.types import Metadata

log = logging.getLogger(__name__)

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
"""The first of these columns that exists holds the names of the files."""


@dataclass(frozen=True)
class Named:
    """What a table says of a picture.

    Attributes:
        name: the picture's name there.
        prompt: its prompt.
        columns: those of the further columns that have a value.
    """

    name: str
    prompt: str
    columns: Metadata


def named_prompts(table: Path, names: Sequence[str], further: Sequence[str] = ()) -> list[Named | None]:
    """What a table says of each picture; None for a picture that it does not name.

    Names agree whatever their Unicode form (macOS and Linux differ) and whichever slashes they have. Where no name
    agrees, the leading folder that all names in the table share may be left out, so that images/a.png
    stands for a.png.

    Args:
        table: file of TABLE_SUFFIXES with a column of FILE_COLUMNS and one of prompts.
        names: the pictures' paths inside their folder, with slashes.
        further: names of columns to read, which a row may lack.

    Raises:
        PromptError: the table cannot be read, names no picture, or a name stands for two pictures or prompts.
    """
    if not (found := _prompts_by_name(table, further)):
        raise PromptError(f"{table} is empty, expected file names and prompts")
    pictures = _by_plain_name(names, "pictures")
    if not found.keys() & pictures.keys():
        found = _without_shared_folder(table, found, pictures)
    return [found.get(_plain(name)) for name in names]


def _prompts_by_name(table: Path, further: Sequence[str]) -> dict[str, Named]:
    """Plain name -> what the table says of it."""
    if table.suffix.lower() not in TABLE_SUFFIXES:
        raise PromptError(f"--prompts {table}: expected .txt, {', '.join(TABLE_SUFFIXES)}")
    found: dict[str, Named] = {}
    try:
        for row in table_rows(table, _columns, further):
            if not any(row.texts):  # such as the blank lines at the end of a spreadsheet
                continue
            name, prompt = row.texts
            if not name.strip():
                raise PromptError(f"{table}, {row.place}: the prompt {shown(prompt)} has no file name")
            plain = _plain(name)
            if plain in found:
                others = " and ".join(sorted({repr(name), repr(found[plain].name)}))
                raise PromptError(f"{table} names {others} twice, expected one prompt per picture")
            found[plain] = Named(name, prompt, row.columns)
    except OSError as error:
        raise PromptError(f"cannot read prompts from {table}: {error.strerror or error}") from error
    return found


def _columns(names: Sequence[str], where: str) -> list[str]:
    file = find_column(names, FILE_COLUMNS, where)
    if file is None:
        wanted = ", ".join(FILE_COLUMNS)
        raise PromptError(f"{where} has the columns {listed(names)}, expected the file's name in one of {wanted}")
    return [file, pick_column([name for name in names if name != file], where)]


def _plain(name: str) -> str:
    """A name in the one form that is compared."""
    return PurePosixPath(unicodedata.normalize("NFC", name.strip()).replace("\\", "/")).as_posix()


def _by_plain_name(names: Iterable[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        if (plain := _plain(name)) in found:
            raise PromptError(f"the {what} {found[plain]!r} and {name!r} have names that agree: rename one of them")
        found[plain] = name
    return found


def _without_shared_folder(table: Path, found: dict[str, Named], pictures: dict[str, str]) -> dict[str, Named]:
    """The prompts without the leading folders that all names share, as many of them as it takes to find pictures.

    Raises:
        PromptError: no number of folders helps, or two numbers do.
    """
    parents = [PurePosixPath(plain).parent.parts for plain in found]
    shared = _common_start(parents)
    fitting = []
    for count in range(1, len(shared) + 1):
        cut = {PurePosixPath(*PurePosixPath(plain).parts[count:]).as_posix(): row for plain, row in found.items()}
        if cut.keys() & pictures.keys():
            fitting.append((PurePosixPath(*shared[:count]).as_posix(), cut))
    if not fitting:
        such = shown(next(iter(pictures.values()), ""))
        raise PromptError(f"{table} names none of the pictures, such as {such}: give names inside their folder")
    if len(fitting) > 1:
        both = " and ".join(repr(folder) for folder, _ in fitting[:2])
        raise PromptError(f"{table}: names agree with pictures without {both}: give names inside the pictures' folder")
    folder, cut = fitting[0]
    log.warning("%s: names are taken without their leading %s/", table, folder)
    return cut


def _common_start(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The parts that all paths, of which there is at least one, begin with."""
    low, high = min(paths), max(paths)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:same]
