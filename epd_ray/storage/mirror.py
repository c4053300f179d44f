"""Opens filesystems by URI, and mirrors a local folder to a remote one."""

import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
from pyarrow import fs
from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
)

from epd_ray.errors import EpdRayError, is_own_bug
from epd_ray.storage.lock import LEASE

ATTEMPTS, WAIT = 4, wait_exponential(multiplier=1, max=8)
TRANSFERS = 8  # files that are transferred at the same time
CHUNK = 2**24  # bytes
TROUBLE = retry_if_exception(
    lambda error: isinstance(error, Exception) and not isinstance(error, EpdRayError) and not is_own_bug(error)
)
"""Errors after which an action is repeated: all but this package's own, because fsspec raises any kind of exception."""
SECRET = re.compile(r"://[^@/]*:[^@]*@|[?&](sig|[^=&]*(secret|password|token|key))=", re.IGNORECASE)
LAST = {"config.yaml": 2, "stages.json": 3}  # ranks of the files that are uploaded last, see _rank

T = TypeVar("T")


class StorageError(EpdRayError):
    """A filesystem is unknown or cannot be reached, or an operation on it failed."""


class Fresh(fs.FSSpecHandler):  # type: ignore[misc]
    """An fsspec filesystem without cached listings, so that files which other processes wrote are seen."""

    def get_file_info(self, paths: list[str]) -> Any:
        self.fs.invalidate_cache()
        return super().get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        self.fs.invalidate_cache()
        return super().get_file_info_selector(selector)


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI, by pyarrow or else by fsspec, and the path in it.

    Raises:
        StorageError: the URI holds a secret, or its filesystem is unknown or cannot be opened.
    """
    if SECRET.search(uri):
        raise StorageError("a run's URI holds a secret key: leave it out, credentials come from the environment")
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path
    except pa.ArrowInvalid as refused:
        try:
            found, path = fsspec.core.url_to_fs(uri)
        except Exception as error:
            raise StorageError(f"cannot open {uri}: {one_line(refused)}; {one_line(error)}") from error
        return fs.PyFileSystem(Fresh(found)), path
    except Exception as error:
        raise StorageError(f"cannot open {uri}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Mirror:
    """Keeps a remote folder equal to a local folder.

    Args:
        root: filesystem whose root is the remote folder.
        folder: the local folder.
        name: URI of the remote folder, for messages.
        require: raises if this process may no longer write to the remote folder.
    """

    def __init__(self, root: fs.FileSystem, folder: Path, name: str, require: Callable[[], None]) -> None:
        self._root, self._folder, self._name, self._require = root, folder, name, require
        self._saved: dict[str, tuple[int, int]] = {}

    def pull(self, leave_out: Collection[str]) -> None:
        """Download all files but those in the top-level folders `leave_out`.

        Raises:
            StorageError: the remote folder cannot be read.
        """
        found = self._attempt("read", lambda: self._root.get_file_info(fs.FileSelector("", recursive=True)))
        wanted = [
            path
            for info in found
            if info.type == fs.FileType.File
            for path in [PurePosixPath(info.path)]
            if path.parts[0] not in (*leave_out, LEASE) and not any(part.startswith(".") for part in path.parts)
        ]
        self._each("read", self._download, [str(path) for path in wanted])

    def push(self) -> None:
        """Upload files that changed, and remove files that were deleted, since the last call.

        Raises:
            StorageError: the remote folder cannot be written.
            RunDirectoryError: another run has taken the lease.
        """
        self._attempt("write to", self._require)
        now = self._stamps()
        changed = sorted((path for path in now if now[path] != self._saved.get(path)), key=_rank)
        parents = {str(PurePosixPath(path).parent) for path in changed} - {"."}
        self._each("write to", lambda parent: self._root.create_dir(parent, recursive=True), sorted(parents))
        for _, group in groupby(changed, _rank):
            self._each("write to", self._upload, list(group))
        gone = sorted(self._saved.keys() - now.keys(), key=_rank, reverse=True)
        for _, group in groupby(gone, _rank):
            self._each("write to", self._remove, list(group))

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Size in bytes and modification time in ns of every local file, by its path in the folder."""
        found = {}
        for path in self._folder.rglob("*"):
            relative = path.relative_to(self._folder)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    found[relative.as_posix()] = self._stamp(relative.as_posix())
        return found

    def _stamp(self, path: str) -> tuple[int, int]:
        status = (self._folder / path).stat()
        return status.st_size, status.st_mtime_ns

    def _download(self, path: str) -> None:
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._root.open_input_stream(path) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
        self._saved[path] = self._stamp(path)

    def _upload(self, path: str) -> None:
        partial = str(PurePosixPath(path).with_name(f".{PurePosixPath(path).name}.tmp"))
        try:
            stamp, local = self._stamp(path), (self._folder / path).open("rb")
        except FileNotFoundError:  # deleted meanwhile
            return
        with local as source, self._root.open_output_stream(partial) as sink:
            shutil.copyfileobj(source, sink, CHUNK)
        self._root.move(partial, path)
        self._saved[path] = stamp

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._root.delete_file(path)
        del self._saved[path]

    def _each(self, what: str, action: Callable[[str], None], paths: list[str]) -> None:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda path: self._attempt(what, lambda: action(path)), paths))

    def _attempt(self, what: str, action: Callable[[], T]) -> T:
        """Run an action, and repeat it up to ATTEMPTS times in all while it fails."""
        retrying = Retrying(stop=stop_after_attempt(ATTEMPTS), wait=WAIT, retry=TROUBLE)
        try:
            return retrying(action)
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise StorageError(f"cannot {what} {self._name}: {one_line(cause or error)}") from cause


def _rank(path: str) -> int:
    """The order of uploads, in which a file comes after all files that it requires.

    A checkpoint makes a resume possible, config.yaml marks a run, and stages.json a finished run.
    """
    return LAST.get(path, int(path.startswith("checkpoints/")))
