"""The pictures and prompts of WebDataset tars, found without opening a picture and without unpacking."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from epd_ray.errors import SourceError, importing, shown
from epd_ray.prompts.tables import COLUMNS, find_column, further_columns
from epd_ray.prompts.text import MOST_BYTES, decode_text
from epd_ray.storage.pictures import IMAGE_SUFFIXES, UNREAD_SUFFIXES, is_hidden, is_text
from epd_ray.types import Metadata

NESTED = (".tar", ".tgz", ".gz", ".zip", ".parquet")  # a member of such a kind may hold pictures, which are not read


@dataclass(frozen=True)
class TarPicture:
    """A picture in a tar.

    Attributes:
        key: its name without the ending.
        prompt: its prompt; None if the tar has none for it.
        columns: those of the further columns that its .json has.
        place: offset and size of its bytes in the tar.
    """

    key: str
    prompt: str | None
    columns: Metadata
    place: tuple[int, int]


@dataclass
class _Members:
    pictures: list[tuple[PurePosixPath, tuple[int, int]]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # of .txt, by the name without the ending
    records: dict[str, str] = field(default_factory=dict)  # prompts of .json in the same way
    columns: dict[str, Metadata] = field(default_factory=dict)  # and their columns
    left_out: list[str] = field(default_factory=list)


def tar_pictures(path: Path, further: Sequence[str] = ()) -> tuple[list[TarPicture], list[str]]:
    """The pictures of a WebDataset tar in their order, and the names of those that are left out.

    The prompt of a picture x.png is x.txt, or else the prompt in x.json. Members with equal names up to the first dot
    are one sample. A picture x.image.png has the prompt of x.image, or else of x. If x.image has no prompt and the
    sample has a picture x.png, then x.image.png is a part of the sample, such as a mask, and is left out. Also left out
    are hidden members (see `is_hidden`), links, sparse members, names that are not UTF-8, and kinds that are not read.

    Args:
        path: the tar.
        further: names of columns to read from the .json of a picture, even where its prompt comes from a .txt.

    Raises:
        SourceError: the tar is damaged or compressed, or has a text twice.
        PromptError: a text is not in UTF-8 or UTF-16.
    """
    found = _Members()
    try:
        with importing(SourceError, path), path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar):
                _add(found, member, file, path, further)
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile ends silently at a damaged header
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, OSError) as error:
        raise SourceError(f"{path} cannot be read as a plain tar: {error}") from error
    plain = {_stem(name) for name, _ in found.pictures if _stem(name) == _sample(name)}
    pictures = []
    for name, place in found.pictures:
        own = _prompt(found, _stem(name))
        if own is None and _stem(name) != _sample(name) and _sample(name) in plain:
            found.left_out.append(name.as_posix())
        else:
            columns = found.columns.get(_stem(name)) or found.columns.get(_sample(name)) or {}
            pictures.append(TarPicture(_stem(name), own or _prompt(found, _sample(name)), columns, place))
    return pictures, found.left_out


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; the tar's own list of them is emptied, because it would fill the memory."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        yield member


def _add(found: _Members, member: tarfile.TarInfo, file: IO[bytes], path: Path, further: Sequence[str]) -> None:
    name = PurePosixPath(member.name)
    suffix = name.suffix.lower()
    texts = {".txt": found.texts, ".json": found.records}.get(suffix)
    if member.isdir() or (texts is None and suffix not in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES, *NESTED)):
        return
    if texts is not None:
        if is_hidden(name) or not _is_plain(member):
            return
        if member.size > MOST_BYTES:
            raise SourceError(
                f"{path}: {shown(member.name)} has {member.size:,} bytes, expected a prompt: leave it out"
            )
        if _stem(name) in texts:
            raise SourceError(f"{path} has {shown(member.name)} twice: keep one of them")
        file.seek(member.offset_data)
        text = decode_text(file.read(member.size), f"{path}, {member.name}")
        if suffix == ".txt":
            texts[_stem(name)] = text
        else:
            where = f"{path}, {member.name}"
            record = _record(text)
            texts[_stem(name)] = _prompt_of(record, where)
            found.columns[_stem(name)] = further_columns(record, further, where)
    elif suffix not in IMAGE_SUFFIXES or is_hidden(name) or not is_text(name) or not _is_plain(member):
        found.left_out.append(member.name)
    else:
        found.pictures.append((name, (member.offset_data, member.size)))


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member's bytes lie in the tar as they are."""
    return member.isreg() and not member.issparse()


def _stem(name: PurePosixPath) -> str:
    """The name without its ending."""
    return name.with_suffix("").as_posix()


def _sample(name: PurePosixPath) -> str:
    """The name up to the first dot, which all members of a sample share; a dot at its start does not count."""
    start = name.name[:1] if name.name.startswith(".") else ""
    return name.with_name(start + name.name[len(start) :].partition(".")[0]).as_posix()


def _prompt(found: _Members, key: str) -> str | None:
    return found.texts.get(key) or found.records.get(key) or None


def _record(text: str) -> dict[str, object]:
    """A sample's JSON object; empty if it is none, so that the row will say that it has no prompt."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _prompt_of(record: dict[str, object], where: str) -> str:
    """The prompt in a sample's JSON; "" if there is none, which its row will say."""
    for known in COLUMNS:
        if (name := find_column(list(record), [known], where)) is not None:
            value = record[name]
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, str) and value:
                return value
    return ""
