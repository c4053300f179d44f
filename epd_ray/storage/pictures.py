"""Pictures that people bring: the formats that are read, the one decoder, and the pictures of a folder.

Every `Image.open` of a stranger's file is here, or where the reward server reads PNG, and names the formats, because
Pillow goes by a file's content rather than its name: PostScript that is called x.png would start Ghostscript.
"""

import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO

from PIL import Image

from epd_ray.errors import PictureError, shown

log = logging.getLogger(__name__)

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
"""Pillow's name of each format that is read, and the endings of its files in small letters."""
IMAGE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
UNREAD_SUFFIXES = frozenset(
    (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".ico", ".eps", ".exr", ".dds")
)
"""Endings of pictures that are not read, and therefore named."""
MOST_PIXELS = 89_478_485  # above it, Pillow warns of a decompression bomb; 256 MiB as RGB
MOST_BYTES = 1 << 30  # bytes of a picture's file
NAMED = 3  # names in a line about what is left out
ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# -- decoding ---------------------------------------------------------------------------------------------------------


def decode_picture(file: Path | bytes) -> Image.Image:
    """Decode a picture as RGB of 8 bits a channel, turned as its EXIF orientation says.

    Transparency is left out: the colour that is stored beneath it counts. Of colours with 16 bits a channel, Pillow
    takes the upper 8. Damaged metadata (EXIF, XMP, colour profile, texts) does not matter.

    Args:
        file: a file, or its content.

    Raises:
        PictureError: it is no picture of FORMATS, damaged, animated, larger than MOST_PIXELS or MOST_BYTES, or grey of
            more than 8 bits. The message is the reason alone; which picture it is, the caller adds.
    """
    try:
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        if not size:
            raise PictureError("the file is empty")
        if size > MOST_BYTES:
            raise PictureError(f"the file has {size:,} bytes, at most {MOST_BYTES:,} are read: reduce it")
        with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
            try:
                return _decoded(stream)
            except PictureError:
                raise
            except Exception:  # decoders raise any kind of exception, also for metadata, which they need not
                stream.seek(0)
                if (bare := _without_metadata(stream.read())) is None:
                    raise
                return _decoded(io.BytesIO(bare))
    except PictureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"no known image format, expected one of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = next(iter(re.findall(r"\d+", str(error))), "too many")
        raise PictureError(f"it has {pixels} pixels, at most {MOST_PIXELS:,} are read: reduce it") from error
    except OSError as error:
        raise PictureError(error.strerror or " ".join(str(error).split())) from error
    except Exception as error:
        raise PictureError(" ".join(str(error).split()) or type(error).__name__) from error


def _decoded(stream: IO[bytes]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, and about the size, which is checked here
        with Image.open(stream, formats=tuple(FORMATS)) as picture:  # this reads only the header
            if picture.width * picture.height > MOST_PIXELS:
                raise PictureError(
                    f"it has {picture.width} x {picture.height} pixels, at most {MOST_PIXELS:,} are read: reduce it"
                )
            if picture.format != "MPO" and getattr(
                picture, "is_animated", False
            ):  # MPO: a camera's preview comes after
                raise PictureError("it is animated or has several pages, expected a single picture")
            if picture.mode.startswith(("I", "F")):
                raise PictureError(f"it has mode {picture.mode}, expected 8 bits a channel: convert it")
            picture.load()
            turn = TURNS.get(_orientation(picture))
            rgb = picture.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    """How the picture is to be turned, from 1 to 8; 1, which is upright, where the metadata does not say."""
    try:
        found = picture.getexif().get(ORIENTATION)
    except Exception:  # parsers of damaged EXIF raise any kind of exception
        return 1
    return found if isinstance(found, int) else 1


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG file with only what its pixels and its orientation need; None for any other file."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[:8] + b"".join(_png_chunks(data))
    if data.startswith(b"\xff\xd8"):
        return _jpeg_without_metadata(data)
    return None


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The chunks that pixels need (those with a capital, and tRNS), and whole ones of EXIF and animation."""
    start = 8
    while start + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, start)
        kind, chunk = data[start + 4 : start + 8], data[start : start + 12 + size]
        sound = zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
        if kind[:1].isupper() or kind == b"tRNS" or (sound and kind == b"eXIf") or (kind == b"acTL" and size == 8):
            yield chunk
        start += 12 + size
    yield data[start:]


def _jpeg_without_metadata(data: bytes) -> bytes:
    """The file without its segments APP0 to APP15, except EXIF (APP1) and a whole Adobe segment (how colours lie)."""
    kept, start = [data[:2]], 2
    while data[start : start + 1] == b"\xff" and start + 4 <= len(data) and data[start + 1] != 0xDA:
        marker, size = data[start + 1], 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        adobe = marker == 0xEE and size >= 16
        if not 0xE0 <= marker <= 0xEF or marker == 0xE1 or adobe:
            kept.append(data[start : start + size])
        start += size
    return b"".join([*kept, data[start:]])


# -- folders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What lies below a folder.

    Attributes:
        files: the files that were asked for, in the order of `in_order`.
        left_out: names of pictures and linked folders that are left out, relative to the folder, in order.
    """

    files: list[Path]
    left_out: list[str]


def files_below(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Found:
    """List the files with one of some endings in a folder and its subfolders.

    Linked folders are read too, once each. Left out are hidden files and folders (see `is_hidden`), pictures of
    UNREAD_SUFFIXES, what is no regular file, and names that are not UTF-8.

    Args:
        folder: an existing folder.
        suffixes: the endings, in small letters; the case of a file's own ending does not matter.
    """
    files: list[Path] = []
    left_out: list[str] = []
    for path in _walk(folder, left_out):
        suffix = path.suffix.lower()
        if suffix not in suffixes and suffix not in UNREAD_SUFFIXES:
            continue
        name = path.relative_to(folder)
        if suffix in UNREAD_SUFFIXES or is_hidden(name) or not path.is_file() or not is_text(name):
            left_out.append(name.as_posix())
        else:
            files.append(path)
    return Found(in_order(folder, files), sorted(left_out))


def _walk(folder: Path, left_out: list[str]) -> Iterator[Path]:
    """Everything below a folder except folders; a folder that is also linked goes by its own name."""
    seen: set[tuple[int, int]] = set()
    waiting, links = [folder], list[Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                left_out.append(f"{here.relative_to(folder).as_posix()}/")
                continue
            seen.add((status.st_dev, status.st_ino))
            paths = sorted(here.iterdir())
        except OSError as error:
            left_out.append(f"{here.relative_to(folder).as_posix()}/ ({error.strerror})")
            continue
        for path in paths:
            if not path.is_dir():
                yield path
            elif path.is_symlink():
                links.append(path)
            else:
                waiting.append(path)


def is_text(name: PurePath) -> bool:
    """Whether a name is valid UTF-8; Python reads other bytes as halves of characters, which no table can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in name.as_posix())


def is_hidden(name: PurePath) -> bool:
    """Whether a name inside a folder or an archive, or a folder on its way, is hidden.

    Such names start with a dot, or belong to what macOS and Synology keep beside files: they are copies, previews or
    resource forks, even where they are called x.png.
    """
    return any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in name.parts if part != "..")


def in_order(root: Path, files: Iterable[Path]) -> list[Path]:
    """The files below a folder, sorted by name; numbers in names are compared by value, so 1000.png follows 999.png."""

    def key(file: Path) -> tuple[list[tuple[int, str]], str]:
        name = file.relative_to(root).as_posix()
        parts = re.split(r"(\d+)", name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name

    return sorted(files, key=key)


def say_left_out(source: object, names: Sequence[str]) -> None:
    """Log one line about pictures of a source that are not read; nothing if there are none."""
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        log.warning(
            "%s: %d left out (hidden, linked twice, unreadable, or no single picture of a kind that is read): %s%s",
            source, len(names), ", ".join(map(shown, names[:NAMED])), more,
        )  # fmt: skip
