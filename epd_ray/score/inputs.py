"""Builds an index of the pictures and prompts in folders, WebDataset tars or Parquet files.

An index is an Arrow table with one row per picture: id, prompt, error, and where its bytes lie, which is `file` with
`offset` and `size`, or with `row_group` and `row` for Parquet. Where heads read columns of a row, these stand in
`columns` as JSON. No picture is opened to build the index. The error of a picture without a prompt is NO_PROMPT; of one
that lacks what a head reads, it says so; else it is null.
"""

import glob
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from epd_ray.errors import PromptError, SourceError, importing, shown
from epd_ray.prompts.files import read_prompts
from epd_ray.prompts.panel import SETTING, Panel
from epd_ray.prompts.tables import (
    COLUMNS,
    find_column,
    further_columns,
    further_names,
    listed,
    pick_column,
    require_text,
    text_of,
)
from epd_ray.prompts.text import read_text
from epd_ray.score.names import Named, named_prompts
from epd_ray.score.tars import tar_pictures
from epd_ray.storage.pictures import IMAGE_SUFFIXES, files_below, in_order, is_hidden, say_left_out
from epd_ray.types import Metadata

IMAGE_COLUMN, ID_COLUMN = "image", "id"
PLACES = {"range": ("offset", "size"), "row": ("row_group", "row")}
NO_PROMPT = "no prompt"


@dataclass
class _Rows:
    """The rows of an index as they are collected; `places` are (offset, size) or (row_group, row)."""

    panel: Panel
    columns: list[Metadata] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, row_id: str, prompt: str | None, columns: Metadata, file: str, place: tuple[int, int]) -> None:
        self.columns.append(columns)
        self.ids.append(row_id)
        self.prompts.append((prompt or "").strip())
        self.files.append(file)
        self.places.append(place)

    def table(self, kind: str) -> pa.Table:
        first, second = PLACES[kind]
        texts = [json.dumps(columns, ensure_ascii=False, sort_keys=True) for columns in self.columns]
        return pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "prompt": pa.array(self.prompts, pa.string()),
                **({"columns": pa.array(texts, pa.string())} if self.panel.columns else {}),
                "error": pa.array(map(self._error, self.prompts, self.columns), pa.string()),
                "file": pa.array(self.files, pa.string()),
                first: pa.array([a for a, _ in self.places], pa.int64()),
                second: pa.array([b for _, b in self.places], pa.int64()),
            }
        )

    def _error(self, prompt: str, columns: Metadata) -> str | None:
        if not prompt:
            return NO_PROMPT
        return self.panel.problem(columns) if self.panel.columns else None


def read_index(source: str, prompts: Path | None = None, panel: Panel | None = None) -> pa.Table:
    """The index of a source, in a fixed order.

    Args:
        source: a folder of images, a .tar or .parquet file, a folder of such files, or a glob pattern.
        prompts: prompt file for a folder of images: a table with file names and prompts (see `named_prompts`), or .txt
            with one prompt per line in the order of `in_order`; None takes the prompt of x.png from x.txt beside it.
        panel: the heads, whose columns are read; None where they read none.

    Raises:
        SourceError: the source is missing, damaged, of several kinds, without any prompt, or holds an id twice.
        PromptError: the prompt file cannot be used, or no row has the column that names the heads.
    """
    panel = panel or Panel({})
    root, files = _files(source, prompts)
    kind = _kind(source, files)
    if prompts is not None and kind != "images":
        raise SourceError(f"--prompts belongs to a folder of images, but {source} holds {kind}: leave it out")
    rows = _Rows(panel)
    if kind == "images":
        _index_folder(rows, root, files, prompts)
    else:
        index: Callable[[_Rows, Path, str], None] = {"tars": _index_tar, "Parquet": _index_parquet}[kind]
        for file in files:
            index(rows, file, file.relative_to(root).as_posix())
    say_left_out(source, rows.left_out)
    if not rows.ids:
        raise SourceError(f"{source} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    if not any(rows.prompts):
        fix = "give --prompts FILE, or put x.txt beside x.png" if kind == "images" else "put key.txt beside key.png"
        raise SourceError(f"{source} has {len(rows.ids)} pictures and no prompt: {fix}")
    if panel.column is not None and not any(panel.column in columns for columns in rows.columns):
        where = source if prompts is None else str(prompts)
        raise PromptError(f"{where} has no column {panel.column!r}, which {SETTING} names: add it, or set another one")
    table = rows.table("row" if kind == "Parquet" else "range")
    _require_unique(table["id"], source)
    return table


def _files(source: str, prompts: Path | None) -> tuple[Path, list[Path]]:
    """The folder that ids are relative to, and all files of the source that can hold pictures, not the prompts."""
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
    table = None if prompts is None else prompts.absolute()  # maybe a .parquet file beside the pictures
    for file in files:
        if file == table:
            continue
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
    names = [file.relative_to(root).as_posix() for file in files]
    if prompts is None or prompts.suffix.lower() == ".txt":
        found = [
            Named(name, text or "", {}) for name, text in zip(names, folder_prompts(root, files, prompts), strict=True)
        ]
    else:
        found = [named or Named("", "", {}) for named in named_prompts(prompts, names, rows.panel.columns)]
    for file, name, named in zip(files, names, found, strict=True):
        rows.add(name, named.prompt, named.columns, str(file), (0, file.stat().st_size))


def folder_prompts(root: Path, files: Sequence[Path], prompts: Path | None) -> Sequence[str | None]:
    """The prompt of each picture; None for a picture without one.

    Args:
        root: a folder of images.
        files: images in it or below, sorted by `in_order`.
        prompts: prompt file, as for `read_index`.

    Raises:
        PromptError: the file cannot be used, has another number of lines, or names none of the pictures or one twice.
    """
    if prompts is None:
        return [_prompt_beside(file) for file in files]
    if prompts.suffix.lower() == ".txt":
        lines = read_prompts(prompts)
        if len(lines) != len(files):
            raise PromptError(f"{prompts} has {len(lines)} prompts for {len(files)} pictures: one line each is needed")
        return lines
    found = named_prompts(prompts, [file.relative_to(root).as_posix() for file in files])
    return [None if named is None else named.prompt for named in found]


def _prompt_beside(picture: Path) -> str | None:
    beside = [text for ending in (".txt", ".TXT") if (text := picture.with_suffix(ending)).is_file()]
    if len(beside) > 1 and not beside[0].samefile(beside[1]):
        raise PromptError(f"{beside[0]} and {beside[1]} are both beside {picture}: keep one of them")
    return read_text(beside[0]) if beside else None


# -- tars -------------------------------------------------------------------------------------------------------------


def _index_tar(rows: _Rows, path: Path, name: str) -> None:
    pictures, left_out = tar_pictures(path, rows.panel.columns)
    rows.left_out += [f"{name}/{member}" for member in left_out]
    for picture in pictures:
        rows.add(f"{name}/{picture.key}", picture.prompt, picture.columns, str(path), picture.place)


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _index_parquet(rows: _Rows, path: Path, name: str) -> None:
    """Add the rows of a Parquet file; its pictures are bytes, or structs of bytes and path as on the hub."""
    try:
        with importing(SourceError, path), pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image_path(schema, path)
            if (id_column := find_column(schema.names, [ID_COLUMN], path)) is not None:
                _require_ids(schema, id_column, path)
            others = [n for n in schema.names if n not in (_image_column(schema, path), id_column)]
            if not others:
                raise SourceError(f"{path} has no column of prompts, expected one of {', '.join(COLUMNS)}")
            prompt = pick_column(others, path)
            require_text(schema, prompt, path)
            further = further_names(schema.names, rows.panel.columns, path)
            read = list(dict.fromkeys([prompt, *([id_column] if id_column else []), *further.values()]))
            number = 0
            for group in range(file.num_row_groups):
                part = file.read_row_group(group, columns=read)
                cells = part.select(list(further.values())).to_pylist() if further else [{}] * len(part)
                ids = part[id_column].to_pylist() if id_column else [None] * len(part)
                for row, (text, given) in enumerate(zip(part[prompt].to_pylist(), ids, strict=True)):
                    row_id = f"{name}:{number}" if given is None else str(given)
                    where = f"{path}, row {number}"
                    columns = further_columns(cells[row], list(further), where)
                    rows.add(row_id, text_of(text, prompt, where), columns, str(path), (group, row))
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _require_ids(schema: pa.Schema, column: str, path: Path) -> None:
    kind = schema.field(column).type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    if not any(test(kind) for test in texts):
        raise SourceError(f"{path}: column {column!r} is {kind}, expected text or integers")


def _image_column(schema: pa.Schema, where: str | Path) -> str:
    if (found := find_column(schema.names, [IMAGE_COLUMN], where)) is None:
        raise SourceError(f"{where} has the columns {listed(schema.names)}, expected {IMAGE_COLUMN!r} and a prompt")
    return found


def image_path(schema: pa.Schema, where: str | Path) -> str:
    """The path, inside a Parquet file, of the column with the pictures' bytes.

    Args:
        schema: schema of the file.
        where: name of the file, for messages.

    Raises:
        SourceError: the file has no column of pictures.
    """
    column = _image_column(schema, where)
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{column}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column
    raise SourceError(f"{where}: column {column!r} is {kind}, expected bytes, or a struct with bytes")
