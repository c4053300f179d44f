"""Parquet files that are written completely or not at all, and whose checksums are verified when they are read."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from epd_ray.errors import RunDirectoryError, importing, shown
from epd_ray.storage.run_directory import make_folder, whole


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whose pages have checksums, and create its folder and missing parents.

    Raises:
        RunDirectoryError: the file cannot be written; an earlier file at `path` stays.
    """
    make_folder(path.parent)
    with whole(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_table(
    path: Path, fix: str, columns: Sequence[str] | None = None, expected: pa.Schema | None = None
) -> pa.Table:
    """Read a Parquet file that `write_table` wrote.

    Args:
        path: the file.
        fix: what to do about a file that cannot be read, for the message.
        columns: the names of the columns to read; None reads all.
        expected: columns that the file must have, with their types; others may be there too.

    Raises:
        RunDirectoryError: the file is missing, damaged, or lacks a column.
    """

    def wrong(said: str) -> RunDirectoryError:
        return RunDirectoryError(f"{said} ({fix})")

    try:
        with importing(wrong, path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            kinds = {field.name: field.type for field in schema}
            needed = {field.name: field.type for field in expected or ()}
            lacking = [name for name in columns or () if name not in kinds]
            lacking += [name for name, kind in needed.items() if kinds.get(name) != kind]
            if lacking or len(kinds) < len(schema.names):
                what = (
                    f"its column {shown(lacking[0])} is not as expected" if lacking else "a column stands there twice"
                )
                raise wrong(f"{path} cannot be read: {what}")
            table = file.read(None if columns is None else list(columns))
            table.validate(full=True)  # as for text that is no UTF-8
    except (pa.ArrowException, OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise wrong(f"{path} cannot be read: {os.strerror(number) if number else shown(str(error))[1:-1]}") from error
    return table
