"""Reads prompts from text, CSV, Parquet and JSON Lines files. Wrong files raise an error that names the line."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from epd_ray.errors import PromptError, shown

COLUMNS = ("prompt", "caption", "text", "captions")
"""In a file with columns, the first of these that exists holds the prompts; a single column may have any name."""

_Lines = list[tuple[int, str]]  # line number from 1, and the text


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file in their order, duplicates included.

    Args:
        path: a .csv file with a header (such as COCO's caption files), a .parquet or .jsonl file, each with a column in
            COLUMNS; any other file is text with one prompt per line.

    Raises:
        PromptError: the file is missing, empty or not UTF-8, has no column of prompts, or holds a blank prompt.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower(), _read_text)
    if path.is_dir():
        raise PromptError(f"{path} is a directory, expected a file: {', '.join(SUFFIXES)}")
    try:
        found = read(path)
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path}: {error.strerror or error}") from error
    if not found:
        raise PromptError(f"{path} is empty, expected one prompt per line")
    prompts = [(number, prompt.strip()) for number, prompt in found]
    if blank := [number for number, prompt in prompts if not prompt]:
        raise PromptError(f"{path}, line {blank[0]}: blank, expected a prompt ({len(blank)} blank in all; remove them)")
    return [prompt for _, prompt in prompts]


def pick_column(names: Sequence[str], where: str | Path) -> str:
    """The name of the column that holds the prompts.

    Args:
        names: names of all columns.
        where: the file, for the message.

    Raises:
        PromptError: there are several columns, none of which is in COLUMNS.
    """
    by_name = {name.strip().lower(): name for name in reversed(names)}
    for known in COLUMNS:
        if known in by_name:
            return by_name[known]
    if len(names) == 1:
        return names[0]
    raise PromptError(f"{where} has the columns {', '.join(names) or '(none)'}, expected one of {', '.join(COLUMNS)}")


def _read_text(path: Path) -> _Lines:
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    return [(number, _decode(line, path, number)) for number, line in enumerate(lines, start=1)]


def _read_csv(path: Path) -> _Lines:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    text = "".join(_decode(line, path, n) for n, line in enumerate(data.splitlines(keepends=True), start=1))
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: _Lines = []
    try:
        header = next(rows, None)
        if header is None:
            return found
        index = header.index(pick_column(header, path))
        only = header[0].strip() if len(header) == 1 and header[0].strip().lower() not in COLUMNS else ""
        if ";" in only or "\t" in only:
            raise PromptError(f"{path}, line 1: {only[:60]!r} is one column (separate columns with commas)")
        if " " in only:
            raise PromptError(
                f"{path}, line 1: {header[0][:60]!r} is no column name (add a header such as {COLUMNS[0]})"
            )
        start = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise PromptError(
                    f"{path}, line {start}: {len(row)} columns, expected {len(header)} (quote prompts with commas)"
                )
            found.append((start, row[index] if row else ""))
            start = rows.line_num + 1
    except csv.Error as error:
        raise PromptError(f"{path}, line {rows.line_num}: not CSV ({error})") from error
    return found


def _read_jsonl(path: Path) -> _Lines:
    found: _Lines = []
    for number, line in _read_text(path):
        try:
            record = json.loads(line) if line.strip() else {COLUMNS[0]: ""}
        except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
            raise PromptError(f"{path}, line {number}: not JSON ({str(error).partition(': ')[0]})") from error
        if isinstance(record, str):
            found.append((number, record))
            continue
        where = f"{path}, line {number}"
        if not isinstance(record, dict):
            raise PromptError(f"{where}: {type(record).__name__}, expected an object with a key {COLUMNS[0]!r}")
        key = pick_column([str(name) for name in record], where)
        found.append((number, _first_text(record[key], key, where)))
    return found


def _read_parquet(path: Path) -> _Lines:
    try:
        column = pick_column(pq.read_schema(path).names, path)
        values = pq.read_table(path, columns=[column]).column(0).to_pylist()
    except pa.ArrowInvalid as error:
        raise PromptError(f"{path}: not Parquet ({str(error).splitlines()[0]})") from error
    return [(n, _first_text(value, column, f"{path}, row {n}")) for n, value in enumerate(values, start=1)]


def _first_text(value: object, column: str, where: str) -> str:
    """The prompt in a cell; of a list of captions the first, because scores on COCO use one prompt per picture."""
    if isinstance(value, list) and value:
        value = value[0]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(f"{where}: {shown(column)} is {type(value).__name__}, expected text")
    return value


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


_READERS: dict[str, Callable[[Path], _Lines]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
}
SUFFIXES = tuple(_READERS)
"""The file name endings that `read_prompts` knows; a file with any other is read as text."""
