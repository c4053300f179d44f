"""Decodes the pictures of rows and scores them. A failure becomes the error of its row, and other rows go on."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from epd_ray.errors import PictureError, RewardError
from epd_ray.prompts.panel import Panel
from epd_ray.score.inputs import image_path
from epd_ray.storage.pictures import MOST_BYTES, decode_picture
from epd_ray.types import FloatArray

BLOCK_BYTES = 16 << 20  # bytes of pixels after which a table is handed on
READ_ROWS = 64  # rows of a Parquet file that are in memory at a time
ROWS_PER_TASK = 256
ABOUT = ("id", "prompt", "columns", "error")  # what a decoded row keeps of the index, which may lack the columns

Score = Callable[..., FloatArray]
"""Returns raw scores [B] of images [B, 3, H, W], uint8, given their prompts and ids. Where there is a panel, it gets
their rows too, and returns NaN where the head does not judge one (see `Scorer.score`). It raises RewardError."""


def pieces(index: pa.Table) -> list[pa.Table]:
    """Split an index, or some of its rows, into a table per reading task; each Parquet row group stays in one table."""
    if "row_group" not in index.column_names:
        return [index.slice(i, ROWS_PER_TASK) for i in range(0, len(index), ROWS_PER_TASK)]
    files, groups = index["file"].to_pylist(), index["row_group"].to_pylist()
    cuts = [0]
    for i in range(1, len(index)):
        another = (files[i], groups[i]) != (files[i - 1], groups[i - 1])
        if another and i - cuts[-1] >= ROWS_PER_TASK:
            cuts.append(i)
    return [index.slice(a, b - a) for a, b in zip(cuts, [*cuts[1:], len(index)], strict=True)]


def decode(piece: pa.Table) -> Iterator[pa.Table]:
    """Read and decode the pictures of a piece; yields tables of schema PIXELS with about BLOCK_BYTES of pixels each."""
    read = _parquet_bytes if "row_group" in piece.column_names else _file_bytes
    rows: list[dict[str, object]] = []
    size = 0
    for row, data in read(piece.to_pylist()):
        kept = {name: row[name] for name in ABOUT if name in row}
        if row["error"] is None:
            kept |= _decoded(data)
        rows.append(kept)
        size += len(kept.get("pixels") or b"")  # type: ignore[arg-type]
        if size >= BLOCK_BYTES:
            yield pa.Table.from_pylist(rows, schema=PIXELS)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=PIXELS)


PIXELS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("columns", pa.string()),
        ("error", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.large_binary()),
    ]
)
"""Decoded rows; columns are JSON, and null where no head reads any. Pixels are RGB bytes [height, width, 3], and null
for a row with an error."""


def _decoded(data: bytes | str) -> dict[str, object]:
    """The columns height, width and pixels of a picture, or error if there is no picture."""
    if isinstance(data, str):
        return {"error": data}
    try:
        rgb = decode_picture(data)
    except PictureError as error:
        return {"error": f"picture cannot be decoded: {error}"}
    return {"height": rgb.height, "width": rgb.width, "pixels": rgb.tobytes()}


_Row = dict[str, object]


def _file_bytes(rows: Sequence[_Row]) -> Iterator[tuple[_Row, bytes | str]]:
    """Each row with the bytes of its picture, or with the reason (a str) why they cannot be read."""
    for row in rows:
        try:
            with open(str(row["file"]), "rb") as file:  # noqa: PTH123
                file.seek(int(row["offset"]))  # type: ignore[call-overload]
                size = int(row["size"])  # type: ignore[call-overload]
                yield row, file.read(min(size, MOST_BYTES + 1))  # which the decoder refuses if it is that many
        except OSError as error:
            yield row, f"picture cannot be read: {error.strerror}"


def _parquet_bytes(rows: Sequence[_Row]) -> Iterator[tuple[_Row, bytes | str]]:
    groups: dict[tuple[object, object], dict[object, _Row]] = defaultdict(dict)
    for row in rows:
        groups[row["file"], row["row_group"]][row["row"]] = row
    for (file, group), wanted in groups.items():
        try:
            for number, data in _row_group(str(file), int(group)):  # type: ignore[call-overload]
                if number in wanted:
                    yield wanted.pop(number), "no picture" if data is None else data
        except (pa.ArrowException, OSError) as error:
            for row in wanted.values():
                yield row, f"picture cannot be read: {str(error).splitlines()[0]}"


def _row_group(path: str, group: int) -> Iterator[tuple[int, bytes | None]]:
    """The row numbers and pictures of a row group, READ_ROWS of which are in memory at a time."""
    with pq.ParquetFile(path) as file:
        column = image_path(file.schema_arrow, path)
        number = 0
        for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=[column], use_threads=False):
            values = batch.column(0)
            for value in values.field("bytes") if pa.types.is_struct(values.type) else values:
                yield number, value.as_py()
                number += 1


# -- scores -----------------------------------------------------------------------------------------------------------


def score_rows(table: pa.Table, head: str, score: Score, panel: Panel | None = None) -> pa.Table:
    """Add a column with a head's scores to decoded rows; a row that the head could not score gets an error.

    Pictures of equal size form a batch. If the head fails on a batch, its rows are scored one by one.

    Args:
        table: rows with at least the columns of PIXELS.
        head: name of the head.
        score: the head's scoring function.
        panel: which rows the head judges, and what it reads of them; None where it judges all and reads nothing.
    """
    values: list[float | None] = [None] * len(table)
    errors = table["error"].to_pylist()
    ids, prompts, pixels = table["id"].to_pylist(), table["prompt"].to_pylist(), table["pixels"]
    columns = table["columns"].to_pylist() if panel is not None else []
    sizes = defaultdict(list)
    for i, size in enumerate(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)):
        if pixels[i].is_valid:
            sizes[size].append(i)
    for (height, width), rows in sizes.items():
        images = np.stack([np.frombuffer(pixels[i].as_buffer(), np.uint8).reshape(height, width, 3) for i in rows])
        batch: list[Any] = [images.transpose(0, 3, 1, 2), [prompts[i] for i in rows], [ids[i] for i in rows]]
        if panel is not None:
            batch.append([panel.given(head, json.loads(columns[i])) for i in rows])
        for i, value in zip(rows, _attempt(score, batch), strict=True):
            if isinstance(value, float):
                values[i] = None if math.isnan(value) else value
            else:
                errors[i] = "; ".join(filter(None, (errors[i], f"{head}: {value}")))
    there = table.column_names.index("error")
    with_errors = table.set_column(there, "error", pa.array(errors, pa.string()))
    return with_errors.append_column(score_column(head), pa.array(values, pa.float32()))


def score_column(head: str) -> str:
    """The name of the column with a head's scores in the tables of the pipeline."""
    return f"score:{head}"


def _attempt(score: Score, batch: Sequence[Any]) -> list[float | str]:
    """For each row its score, or a text that says why the head could not score it; `batch` has a row in each part."""
    try:
        return [float(value) for value in score(*batch)]
    except RewardError as error:
        if len(batch[0]) == 1:
            return [error.problem]
    alone = [_attempt(score, [part[i : i + 1] for part in batch]) for i in range(len(batch[0]))]
    return [value for values in alone for value in values]
