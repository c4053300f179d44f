"""Rows of the tables that people bring: CSV, TSV, JSON lines, JSON and Parquet, read as a stream except for JSON.

Only the columns that are asked for are read, and what other columns hold does not matter. Prompts and names of files
are text: what looks like a number or a date stays what it was. Columns for reward heads are what JSON can say.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from epd_ray.errors import PromptError, importing, shown
from epd_ray.prompts.cells import Pairs, json_cell
from epd_ray.prompts.text import decode_text, lines
from epd_ray.types import Metadata

COLUMNS = ("prompt", "caption", "text", "captions")
"""In a file with columns, the first of these that exists holds the prompts; a single column may have any name."""
BATCH_ROWS = 1024  # rows of a Parquet file in memory at a time

Choose = Callable[[Sequence[str], str], Sequence[str]]
"""Picks the columns to read, given the names of all columns and the file or line for a message."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        place: where it stands, such as "line 3".
        texts: the text of each chosen column; no text at all for a blank line.
        columns: those of the further columns that have a value in this row.
    """

    place: str
    texts: Sequence[str]
    columns: Metadata = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """The columns to read.

    Attributes:
        choose: picks the columns of text; in JSON, where each row may have its own, it is called for each row.
        further: names of columns for reward heads, which a row may lack.
    """

    choose: Choose
    further: Sequence[str] = ()

    def found(self, names: Sequence[str], where: str | Path) -> dict[str, str]:
        """Each further column that is among `names` -> its name there.

        Raises:
            PromptError: two columns have the same name.
        """
        return further_names(names, self.further, where)


def table_rows(path: Path, choose: Choose, further: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a table.

    Args:
        path: a file with one of TABLE_SUFFIXES.
        choose: see Wanted.
        further: see Wanted.

    Raises:
        PromptError: the file is damaged, a chosen column is no text, or a further one nothing that JSON can say.
        OSError: the file cannot be opened.
    """
    with importing(PromptError, path):
        yield from _READERS[path.suffix.lower()](path, Wanted(choose, further))


def further_columns(record: Mapping[str, object], further: Sequence[str], where: str) -> Metadata:
    """Those of some columns that have a value in a record; whatever the case of their names.

    Raises:
        PromptError: a value is nothing that JSON can say, or two columns have the same name.
    """
    return _columns(record, further_names(list(record), further, where), where)


def further_names(names: Sequence[str], further: Sequence[str], where: str | Path) -> dict[str, str]:
    """Each of some columns that is among `names` -> its name there.

    Raises:
        PromptError: two columns have the same name.
    """
    there = {wanted: find_column(names, [wanted], where) for wanted in further}
    return {wanted: name for wanted, name in there.items() if name is not None}


def _columns(record: Mapping[str, object], names: Mapping[str, str], where: str) -> Metadata:
    cells = {asked: json_cell(record[name], name, where) for asked, name in names.items()}
    return {asked: cell for asked, cell in cells.items() if cell is not None}


def find_column(names: Sequence[str], known: Sequence[str], where: str | Path) -> str | None:
    """The column that has the first of some known names; case and spaces around a name do not matter.

    Raises:
        PromptError: two columns have the same known name.
    """
    for wanted in known:
        same = [name for name in names if name.strip().lower() == wanted.strip().lower()]
        if len(same) > 1:
            raise PromptError(f"{where} has the columns {same[0]!r} and {same[1]!r}: keep one of them")
        if same:
            return same[0]
    return None


def pick_column(names: Sequence[str], where: str | Path) -> str:
    """The name of the column that holds the prompts.

    Args:
        names: names of all columns.
        where: the file, for the message.

    Raises:
        PromptError: two columns have the same name of COLUMNS, or there are several columns, none of which is there.
    """
    if (found := find_column(names, COLUMNS, where)) is not None:
        return found
    if len(names) == 1:
        return names[0]
    raise PromptError(f"{where} has the columns {listed(names)}, expected one of {', '.join(COLUMNS)}")


def listed(names: Sequence[str]) -> str:
    """The names of columns for a message."""
    text = " ".join(", ".join(names).split()) or "(none)"
    return text if len(text) <= 120 else f"{text[:117]}..."


def text_of(value: object, column: str, where: str) -> str:
    """The text in a cell; of a list of captions the first, because scores on COCO use one prompt per picture.

    Args:
        value: the cell; None and an empty list have the text "".
        column: the name of the column, for the message.
        where: the row, for the message.

    Raises:
        PromptError: the cell holds something else.
    """
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(f"{where}: {column!r} is {type(value).__name__}, expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can say so, but no file can hold it
        raise PromptError(f"{where}: {column!r} is {shown(value)}, which has half of a character: write it anew")
    return value


# -- CSV and TSV ------------------------------------------------------------------------------------------------------


def _csv(path: Path, wanted: Wanted) -> Iterator[Row]:
    return _with_header(path, wanted, _csv_rows(path), "quote prompts with commas")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(1 << 30)  # another column may hold a picture in base64
    rows = csv.reader((line for _, line in lines(path)), strict=True)
    start = 1
    try:
        for row in rows:
            yield start, row
            start = rows.line_num + 1
    except csv.Error as error:
        raise PromptError(f"{path}, line {rows.line_num}: not CSV ({error})") from error


def _tsv(path: Path, wanted: Wanted) -> Iterator[Row]:
    cells = ((n, line.rstrip("\r\n")) for n, line in lines(path))
    rows = ((n, [_unquoted(cell) for cell in line.split("\t")] if line else []) for n, line in cells)
    return _with_header(path, wanted, rows, "a prompt can have no tab and no line break")


def _unquoted(cell: str) -> str:
    """A cell without the quotes that spreadsheets put around it; quotes that belong to the text stay."""
    inner = cell[1:-1]
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else cell


def _with_header(path: Path, wanted: Wanted, rows: Iterator[tuple[int, list[str]]], fix: str) -> Iterator[Row]:
    _, header = next(rows, (0, None))
    if header is None:
        return
    if len(header) == 1 and (only := header[0].strip()).lower() not in COLUMNS:
        if ";" in only or "\t" in only:
            raise PromptError(f"{path}, line 1: {only[:60]!r} is one column (separate columns with commas)")
        if " " in only:
            raise PromptError(f"{path}, line 1: {only[:60]!r} is no column name (add a header such as {COLUMNS[0]})")
    indices = [header.index(name) for name in wanted.choose(header, str(path))]
    further = wanted.found(header, path)
    for number, row in rows:
        if row and len(row) != len(header):
            raise PromptError(f"{path}, line {number}: {len(row)} columns, expected {len(header)} ({fix})")
        place = f"line {number}"
        if row:
            cells = dict(zip(header, row, strict=True)) if further else {}
            yield Row(place, [row[index] for index in indices], _columns(cells, further, f"{path}, {place}"))
        else:
            yield Row(place, [])


# -- JSON -------------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, wanted: Wanted) -> Iterator[Row]:
    for number, line in lines(path):
        place = f"line {number}"
        if line.strip():
            yield _record(_parsed(line, f"{path}, {place}"), wanted, path, place)
        else:
            yield Row(place, [])


def _json(path: Path, wanted: Wanted) -> Iterator[Row]:
    found = _parsed(decode_text(path.read_bytes(), path), f"{path} (one object a line belongs into a .jsonl file)")
    if isinstance(found, dict) and "annotations" in found:  # the form of COCO's captions
        found = found["annotations"]
    if not isinstance(found, list):
        raise PromptError(f"{path}: {shown(found)}, expected a list of texts or objects, or COCO's annotations")
    for number, record in enumerate(found, start=1):
        yield _record(record, wanted, path, f"entry {number}")


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=Pairs)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise PromptError(f"{where}: not JSON ({str(error).partition(': ')[0]})") from error


def _record(record: object, wanted: Wanted, path: Path, place: str) -> Row:
    where = f"{path}, {place}"
    if isinstance(record, str):
        record = Pairs([(COLUMNS[0], record)])
    if not isinstance(record, Pairs):
        raise PromptError(f"{where}: {type(record).__name__}, expected an object with a key {COLUMNS[0]!r}")
    texts = [text_of(record[name], name, where) for name in wanted.choose(record.names, where)]
    return Row(place, texts, _columns(record, wanted.found(record.names, where), where))


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(path: Path, wanted: Wanted) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = wanted.choose(schema.names, str(path))
            for name in columns:
                require_text(schema, name, path)
            further = wanted.found(schema.names, path)
            number = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys([*columns, *further.values()]))):
                read = {name: batch[name].to_pylist() for name in {*columns, *further.values()}}
                for i in range(len(batch)):
                    number += 1
                    where = f"{path}, row {number}"
                    texts = [text_of(read[name][i], name, where) for name in columns]
                    cells = {name: read[name][i] for name in further.values()}
                    yield Row(f"row {number}", texts, _columns(cells, further, where))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise PromptError(f"{path}: not Parquet ({str(error).splitlines()[0]})") from error


def require_text(schema: pa.Schema, column: str, where: object) -> None:
    """Refuse a Parquet column that holds neither text nor lists of text.

    Raises:
        PromptError: it holds something else.
    """
    kind = schema.field(column).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(test(kind) for test in texts):
        raise PromptError(f"{where}: {column!r} is {kind}, expected text")


_READERS: dict[str, Callable[[Path, Wanted], Iterator[Row]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".json": _json,
}
TABLE_SUFFIXES = tuple(_READERS)
"""The file name endings that `table_rows` knows, in small letters."""
