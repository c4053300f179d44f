"""Text that people bring: UTF-8 with or without a byte order mark, or UTF-16 with one. Anything else is named."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from epd_ray.errors import PromptError

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
MOST_BYTES = 16 << 20  # bytes of a text that is one prompt


def decode_text(data: bytes, where: object) -> str:
    """Decode a whole text.

    Args:
        data: the text's bytes.
        where: the file, for the message.

    Raises:
        PromptError: the bytes are no text in UTF-8 or UTF-16; the message names the first wrong byte, counted from 0.
    """
    if data.startswith(UTF16) and not data.startswith(UTF32):
        return _decode(data, "utf-16", where, 0)
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    return _decode(data[mark:], "utf-8", where, mark)


def read_text(path: Path) -> str:
    """Read a text that is one prompt.

    Raises:
        PromptError: the file cannot be read, has more than MOST_BYTES, or is no text as for `decode_text`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise PromptError(f"{path} has more than {MOST_BYTES:,} bytes, expected a prompt")
    return decode_text(data, path)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1 and with their ends, one in memory at a time in UTF-8.

    A line ends with LF, CR LF or CR; other separators of Unicode are part of a line.

    Raises:
        PromptError: a line is no text as for `decode_text`.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start.startswith((*UTF16, *UTF32)):
            yield from enumerate(io.StringIO(decode_text(file.read(), path), newline=""), start=1)
            return
        position, number = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0, 0
        file.seek(position)
        for block in file:
            for line in block.splitlines(keepends=True):  # at CR too
                number += 1
                yield number, _decode(line, "utf-8", f"{path}, line {number}", position)
                position += len(line)


def _decode(data: bytes, encoding: str, where: object, position: int) -> str:
    """Decode bytes that begin at `position` of a file."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name, wrong = encoding.upper(), position + error.start
        raise PromptError(f"{where}: not {name} at byte {wrong} ({error.reason}): save the file as UTF-8") from error
    if "\0" in text:  # such as UTF-16 without a byte order mark
        wrong = position + len(text[: text.index("\0")].encode(encoding))
        raise PromptError(f"{where}: the character at byte {wrong} is zero, which no text has: save the file as UTF-8")
    return text
