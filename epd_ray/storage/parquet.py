"""Parquet files that are written completely or not at all."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from epd_ray.storage.run_directory import make_folder, whole


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whose pages have checksums, and create its folder and missing parents.

    Raises:
        RunDirectoryError: the file cannot be written; an earlier file at `path` stays.
    """
    make_folder(path.parent)
    with whole(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
