"""Builds an index of the pictures and prompts in folders, WebDataset tars or Parquet files.

An index is an Arrow table with one row per picture: id, prompt, error, and where its bytes lie, which is `file` with
`offset` and `size`, or with `row_group` and `row` for Parquet. No picture is opened to build the index. The error of a
picture without a prompt is NO_PROMPT, else null.
"""

import glob
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from epd_ray.errors import EpdRayError, PromptError, shown
from epd_ray.prompts.files import COLUMNS, SUFFIXES, pick_column, read_prompts
from epd_ray.storage.pictures import IMAGE_SUFFIXES, files_below, in_order, is_hidden, say_left_out

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
IMAGE_COLUMN, ID_COLUMN = "image", "id"
PLACES = {"range": ("offset", "size"), "row": ("row_group", "row")}
NO_PROMPT = "no prompt"


class SourceError(EpdRayError):
    """The source of pictures does not exist, cannot be read, or holds an id twice."""


@dataclass
class _Rows:
    """The rows of an index as they are collected; `places` are (offset, size) or (row_group, row)."""

    ids: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)

    def add(self, row_id: str, prompt: str | None, file: str, place: tuple[int, int]) -> None:
        self.ids.append(row_id)
        self.prompts.append((prompt or "").strip())
        self.files.append(file)
        self.places.append(place)

    def table(self, kind: str) -> pa.Table:
        first, second = PLACES[kind]
        return pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "prompt": pa.array(self.prompts, pa.string()),
                "error": pa.array([None if p else NO_PROMPT for p in self.prompts], pa.string()),
                "file": pa.array(self.files, pa.string()),
                first: pa.array([a for a, _ in self.places], pa.int64()),
                second: pa.array([b for _, b in self.places], pa.int64()),
            }
        )


def read_index(source: str, prompts: Path | None = None) -> pa.Table:
    """The index of a source, in a fixed order.

    Args:
        source: a folder of images, a .tar or .parquet file, a folder of such files, or a glob pattern.
        prompts: prompt file for a folder of images: .csv, .jsonl or .parquet with file names and prompts, or .txt with
            one prompt per line in the order of `in_order`; None takes the prompt of `x.png` from `x.txt` beside it.

    Raises:
        SourceError: the source is missing, damaged, of several kinds, without any prompt, or holds an id twice.
        PromptError: the prompt file cannot be used.
    """
    root, files = _files(source)
    kind = _kind(source, files)
    if prompts is not None and kind != "images":
        raise SourceError(f"--prompts belongs to a folder of images, but {source} holds {kind}: leave it out")
    rows = _Rows()
    if kind == "images":
        _index_folder(rows, root, files, prompts)
    else:
        index: Callable[[_Rows, Path, str], None] = {"tars": _index_tar, "Parquet": _index_parquet}[kind]
        for file in files:
            index(rows, file, file.relative_to(root).as_posix())
    if not rows.ids:
        raise SourceError(f"{source} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    if not any(rows.prompts):
        fix = "give --prompts FILE, or put x.txt beside x.png" if kind == "images" else "put key.txt beside key.png"
        raise SourceError(f"{source} has {len(rows.ids)} pictures and no prompt: {fix}")
    table = rows.table("row" if kind == "Parquet" else "range")
    _require_unique(table["id"], source)
    return table


def _files(source: str) -> tuple[Path, list[Path]]:
    """The folder that ids are relative to, and all files of the source that can hold pictures."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.absolute().parent, [path.absolute()]
    known = (*IMAGE_SUFFIXES, ".tar", ".parquet")
    if path.is_dir():
        root = path.absolute()
        found = files_below(root, known)
        files, left_out = found.files, found.left_out
    elif glob.has_magic(source) and (by_pattern := _matching(path.absolute())):
        root, files = by_pattern
        left_out = []
    else:
        raise SourceError(f"{source}: no such file or folder")
    kept = []
    for file in files:
        name = file.relative_to(root)
        if is_hidden(name) or _is_scores(file):
            left_out.append(name.as_posix())
        else:
            kept.append(file)
    say_left_out(source, left_out)
    if not kept:
        raise SourceError(f"{source} holds nothing to score, expected {', '.join(known)}")
    return root, kept


def _matching(pattern: Path) -> tuple[Path, list[Path]] | None:
    """The files that a glob pattern matches, and the folder above its first magic part; None if there are none."""
    plain = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:plain])
    found = in_order(root, (p for p in root.glob("/".join(pattern.parts[plain:])) if p.is_file()))
    return (root, found) if found else None


def _is_scores(path: Path) -> bool:
    """Whether a file is a part of scores that `epd-ray score` wrote, maybe into the folder of its source."""
    if not re.fullmatch(r"part-\d{6}\.parquet", path.name):
        return False
    try:
        return b"heads" in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _kind(source: str, files: Sequence[Path]) -> str:
    suffixes = {p.suffix.lower() for p in files}
    names = {"tars": {".tar"}, "Parquet": {".parquet"}, "images": set(IMAGE_SUFFIXES)}
    kinds = [kind for kind, known in names.items() if suffixes & known]
    if not kinds or suffixes - set().union(*names.values()):
        raise SourceError(f"{source}: expected a folder of images, .tar or .parquet, not {min(suffixes) or 'a file'}")
    if len(kinds) > 1:
        raise SourceError(f"{source} holds {' and '.join(kinds)}: choose by a pattern, such as '{source}/*.tar'")
    return kinds[0]


def _require_unique(ids: pa.ChunkedArray, source: str) -> None:
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        first, times = twice[0]["values"].as_py(), twice[0]["counts"]
        raise SourceError(f"{source} has the id {shown(first)} {times} times: make ids unique")


# -- folders ----------------------------------------------------------------------------------------------------------


def _index_folder(rows: _Rows, root: Path, files: Sequence[Path], prompts: Path | None) -> None:
    for file, text in zip(files, folder_prompts(root, files, prompts), strict=True):
        rows.add(file.relative_to(root).as_posix(), text, str(file), (0, file.stat().st_size))


def folder_prompts(root: Path, files: Sequence[Path], prompts: Path | None) -> Sequence[str | None]:
    """The prompt of each picture; None for a picture without one.

    Args:
        root: a folder of images.
        files: images in it or below, sorted by `in_order`.
        prompts: prompt file, as for `read_index`.

    Raises:
        PromptError: the file cannot be used, has another number of lines, or names none of the pictures.
    """
    if prompts is None:
        return [_prompt_beside(file) for file in files]
    if prompts.suffix.lower() == ".txt":
        lines = read_prompts(prompts)
        if len(lines) != len(files):
            raise PromptError(f"{prompts} has {len(lines)} prompts for {len(files)} pictures: one line each is needed")
        return lines
    by_name, names = _named_prompts(prompts), [file.relative_to(root).as_posix() for file in files]
    texts = [by_name.get(name) for name in names]
    if not any(texts):
        raise PromptError(f"{prompts} names none of the pictures in {root}, such as {shown(names[0])}")
    return texts


def _prompt_beside(picture: Path) -> str | None:
    text = picture.with_suffix(".txt")
    return text.read_text(encoding="utf-8", errors="replace") if text.is_file() else None


def _named_prompts(path: Path) -> dict[str, str]:
    """The prompts of a table by file name."""
    if not path.is_file():
        raise PromptError(f"cannot read prompts from {path}: no such file")
    try:
        table = _read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    file = next((name for name in FILE_COLUMNS if name in table.column_names), None)
    if file is None:
        has = ", ".join(table.column_names)
        raise PromptError(f"{path} has the columns {has}, expected the file's name in one of {', '.join(FILE_COLUMNS)}")
    prompt = pick_column([name for name in table.column_names if name != file], path)
    found: dict[str, str] = {}
    for name, text in zip(table[file].to_pylist(), table[prompt].to_pylist(), strict=True):
        key = PurePosixPath(str(name)).as_posix()
        if key in found:
            raise PromptError(f"{path} names {shown(key)} twice, expected one prompt per picture")
        found[key] = _first_text(text)
    return found


def _read_table(path: Path) -> pa.Table:
    match path.suffix.lower():
        case ".csv":
            names = pacsv.open_csv(path).schema.names
            texts = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            return pacsv.read_csv(path, pacsv.ReadOptions(), pacsv.ParseOptions(newlines_in_values=True), texts)
        case ".jsonl":
            return pajson.read_json(path)
        case ".parquet":
            return pq.read_table(path)
    raise PromptError(f"--prompts {path}: expected {', '.join(SUFFIXES)}")


def _first_text(value: object) -> str:
    """The prompt in a cell; of a list of captions the first, and "" if there is no text."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else ""


# -- tars -------------------------------------------------------------------------------------------------------------


def _index_tar(rows: _Rows, path: Path, name: str) -> None:
    """Add the samples of a WebDataset tar; members with equal names up to the first dot belong to one sample."""
    prompts: dict[str, str] = {}
    pictures: list[tuple[str, tuple[int, int]]] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar):
                key, suffix = _key(member.name)
                if suffix in IMAGE_SUFFIXES:
                    pictures.append((key, (member.offset_data, member.size)))
                elif suffix in (".txt", ".json"):
                    file.seek(member.offset_data)
                    prompt = _prompt_of(file.read(member.size), suffix)
                    prompts[key] = prompt or prompts.get(key, "")
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile ends silently at a damaged header
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, OSError) as error:
        raise SourceError(f"{path} cannot be read as a plain tar: {error}") from error
    for key, place in pictures:
        rows.add(f"{name}/{key}", prompts.get(key), str(path), place)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar; the tar's own list of members is emptied, because it would fill the memory."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            yield member


def _key(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return path.with_name(stem or path.name).as_posix(), f".{suffix.lower()}"


def _prompt_of(data: bytes, suffix: str) -> str:
    text = data.decode("utf-8", errors="replace")
    if suffix == ".txt":
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    known: Iterable[Any] = (record[name] for name in COLUMNS if name in record) if isinstance(record, dict) else ()
    return next((text for value in known if (text := _first_text(value))), "")


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _index_parquet(rows: _Rows, path: Path, name: str) -> None:
    """Add the rows of a Parquet file; its pictures are bytes, or structs of bytes and path as on the hub."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image_path(schema, path)
            others = [n for n in schema.names if n not in (IMAGE_COLUMN, ID_COLUMN)]
            prompt = pick_column(others, path) if others else ""
            if not prompt:
                raise SourceError(f"{path} has no column of prompts, expected one of {', '.join(COLUMNS)}")
            columns = [prompt, *([ID_COLUMN] if ID_COLUMN in schema.names else [])]
            number = 0
            for group in range(file.num_row_groups):
                part = file.read_row_group(group, columns=columns)
                ids = part[ID_COLUMN].to_pylist() if ID_COLUMN in columns else [None] * len(part)
                for row, (text, given) in enumerate(zip(part[prompt].to_pylist(), ids, strict=True)):
                    row_id = f"{name}:{number}" if given is None else str(given)
                    rows.add(row_id, _first_text(text), str(path), (group, row))
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def image_path(schema: pa.Schema, where: str | Path) -> str:
    """The path, inside a Parquet file, of the column with the pictures' bytes.

    Args:
        schema: schema of the file.
        where: name of the file, for messages.

    Raises:
        SourceError: the file has no column of pictures.
    """
    if IMAGE_COLUMN not in schema.names:
        raise SourceError(f"{where} has the columns {', '.join(schema.names)}, expected {IMAGE_COLUMN!r} and a prompt")
    kind = schema.field(IMAGE_COLUMN).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{IMAGE_COLUMN}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return IMAGE_COLUMN
    raise SourceError(f"{where}: column {IMAGE_COLUMN!r} is {kind}, expected bytes, or a struct with bytes")
