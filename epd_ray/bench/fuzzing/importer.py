"""One kind of document that is imported, and how the import of one document ends."""

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd_ray.errors import EpdRayError
from epd_ray.rewards.requests import BadRequestError

DEADLINE = 5.0  # seconds
MOST_CHARS = 2000  # of a line of a message
OUTCOMES = ("accepted", "rejected cleanly", "crashed", "hung", "silently wrong")
BAD = OUTCOMES[2:]
SECOND = "written"  # the folder in which an accepted document is written again


@dataclass(frozen=True)
class Importer:
    """One kind of document.

    Attributes:
        make: a valid document of four whole numbers from 0 to 1000, and the value that must be read from it.
        read: reads a document from a file.
        name: the file's name; its ending says how the document may be changed within its form.
        seen: what of the result of `read` is compared.
        write: writes the result of `read` into a folder that exists, as a file of the same name. Reading that file must
            give the same.
        holds: whether the result of `read` keeps a rule that each one must keep, whatever the document in the file.
        around: what must be open while documents are read, such as a server.
        sealed: whether checksums protect the document, so that a damaged one is refused or read as it was.
    """

    make: Callable[[list[int]], tuple[bytes, Any]]
    read: Callable[[Path], Any]
    name: str
    seen: Callable[[Any], Any] = lambda found: found
    write: Callable[[Any, Path], None] | None = None
    holds: Callable[[Any, Path], bool] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    sealed: bool = False


def writes(name: str, encode: Callable[[Any], bytes]) -> Callable[[Any, Path], None]:
    """What writes the encoded result of a `read` as a file of this name, for `Importer.write`."""

    def write(found: Any, folder: Path) -> None:
        (folder / name).write_bytes(encode(found))

    return write


class _Hung(BaseException):
    """The deadline is over; no importer catches it."""


def outcome(importer: Importer, data: bytes, value: Any, *, whole: bool) -> tuple[str, str]:
    """How the import of a document ends.

    Args:
        importer: the kind of document.
        data: the document.
        value: what must be read from the document before it was changed.
        whole: whether it is unchanged.

    Returns:
        One of OUTCOMES, and why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, importer.name)
        path.write_bytes(data)
        try:
            with _deadline():
                read = importer.read(path)
        except (EpdRayError, BadRequestError) as error:
            lines = getattr(error, "problems", None) or [str(error)]
            if any(len(line) > MOST_CHARS or "\n" in line for line in lines):
                return "crashed", "a message that is too long or has several lines"
            if whole:
                return "silently wrong", f"a valid document was refused: {lines[0]}"
            if {found.name for found in Path(folder).iterdir()} != {importer.name}:
                return "crashed", "a file was written"
            return "rejected cleanly", ""
        except _Hung:
            return "hung", f"{DEADLINE} seconds"
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {str(error)[:200]}"
        wrong = _wrong(importer, read, path, value if whole or importer.sealed else None)
        return ("silently wrong", wrong) if wrong else ("accepted", "")


def _wrong(importer: Importer, read: Any, path: Path, value: Any) -> str:
    """What is wrong with what was read; "" for nothing."""
    try:
        seen = importer.seen(read)
        if value is not None and seen != value:
            return f"read {str(seen)[:200]}"
        if importer.holds is not None and not importer.holds(read, path):
            return f"a rule is broken by {str(seen)[:200]}"
        if importer.write is not None:
            folder = path.parent / SECOND
            folder.mkdir()
            importer.write(read, folder)
            if (again := importer.seen(importer.read(folder / importer.name))) != seen:
                return f"written and read again, {str(seen)[:200]} is {str(again)[:200]}"
    except Exception as error:
        return f"cannot be used: {type(error).__name__}: {str(error)[:200]}"
    return ""


@contextmanager
def _deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
