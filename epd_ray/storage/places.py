"""Places of runs: a local directory, or a folder on any filesystem of pyarrow or fsspec with a local working copy.

A remote run holds the state of its last checkpoint: `save` uploads files that changed since the last call, checkpoints
after the files that they require. Each file is uploaded under a temporary name and then renamed. A failed upload is
repeated; if it fails again, it waits for the next checkpoint with a warning, or raises an error at the end of the run.
The working copy is a new folder in the system's temporary directory (TMPDIR); it stays if it was not saved completely.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Protocol

from pyarrow import fs

from epd_ray.errors import EpdRayError, RunDirectoryError
from epd_ray.storage.lock import LEASE, Lease, held, is_at
from epd_ray.storage.mirror import Mirror, StorageError, one_line, open_filesystem
from epd_ray.storage.run_directory import ROLLOUT_SUFFIX, RunDirectory, iteration_of, make_folder, refuse_others

log = logging.getLogger(__name__)

ROLLOUTS = "rollouts"
NOT_TO_RESUME = (ROLLOUTS, "tensorboard")
NOT_TO_LOOK = (*NOT_TO_RESUME, "checkpoints")


class Place(Protocol):
    """A path or URI that holds a run, or will hold one.

    Attributes:
        name: the path or URI, as the user gave it.
    """

    name: str

    def begun(self) -> bool:
        """Whether the place holds a run."""
        ...

    def require_new(self) -> None:
        """Raise RunDirectoryError if a new run cannot begin here."""
        ...

    def require_run(self) -> None:
        """Raise RunDirectoryError if the place holds no run."""
        ...

    def claimed(self) -> AbstractContextManager[Path]:
        """A local folder with all that a run needs to continue, for this process alone; saved when the block ends.

        If another machine has an unfinished run here, its lease is watched for about a minute before it counts as dead.

        Raises:
            RunDirectoryError: another run holds the place.
        """
        ...

    def rollouts_elsewhere(self) -> Collection[int] | None:
        """The iterations whose rollouts the place holds, where `claimed` gives a folder without them; otherwise None.

        Raises:
            StorageError: the place cannot be read.
        """
        ...

    def visited(self) -> AbstractContextManager[Path]:
        """A local folder, without rollouts and checkpoints if the place is remote; saved when the block ends.

        A run may be active in the place at the same time.
        """
        ...

    def save(self) -> None:
        """Upload the changes of the local folder; a failure is only a warning, and the next call tries again."""
        ...


def is_uri(place: str | Path) -> bool:
    """Whether `place` is a URI such as s3://, gs://, hdfs://, file:// or memory://, instead of a local path."""
    return "://" in str(place)


def place_of(where: str | Path) -> Place:
    """The place that a path or URI names.

    Raises:
        StorageError: the URI's filesystem is unknown or cannot be opened.
    """
    return RemotePlace(str(where), *open_filesystem(str(where))) if is_uri(where) else LocalPlace(Path(where))


def inside(where: str | Path, part: str | Path) -> str:
    """The path or URI of a part of a run, for messages."""
    if not is_uri(where):
        return str(Path(where, part))
    return f"{str(where).partition('?')[0].rstrip('/')}/{PurePosixPath(part)}"


@contextmanager
def reading(place: Place, folder: Path) -> Iterator[None]:
    """Replace the local folder by the place's name in the errors of the block."""
    try:
        yield
    except EpdRayError as error:
        error.args = tuple(str(arg).replace(str(folder), place.name) for arg in error.args)
        raise


class LocalPlace:
    """A run in a local directory."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def begun(self) -> bool:
        return RunDirectory(self.path).config.is_file()

    def require_new(self) -> None:
        RunDirectory(self.path).require_new()

    def require_run(self) -> None:
        RunDirectory.open(self.path)

    @contextmanager
    def claimed(self) -> Iterator[Path]:
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        make_folder(self.path)
        lock = RunDirectory(self.path).lock
        with held(lock, self.name) as file:
            try:
                yield self.path
            finally:
                with suppress(OSError):  # if the run wrote no file, remove the lock and the new folders
                    if is_at(file, lock) and [path.name for path in self.path.iterdir()] == [lock.name]:
                        lock.unlink()
                        for folder in made:
                            folder.rmdir()

    def rollouts_elsewhere(self) -> None:
        return None

    @contextmanager
    def visited(self) -> Iterator[Path]:
        yield self.path

    def save(self) -> None:
        pass


class RemotePlace:
    """A run in a folder on another filesystem.

    Args:
        uri: URI of the folder.
        filesystem: the filesystem that the URI names.
        path: path of the folder in the filesystem.
    """

    def __init__(self, uri: str, filesystem: fs.FileSystem, path: str) -> None:
        self.name, self._root = uri, fs.SubTreeFileSystem(path, filesystem)
        self._filesystem, self._path = filesystem, path
        self._mirror: Mirror | None = None

    def begun(self) -> bool:
        return "config.yaml" in self._names()

    def require_new(self) -> None:
        refuse_others(self.name, self._names())

    def require_run(self) -> None:
        if not self.begun():
            raise RunDirectoryError(f"{self.name} is not a run directory: config.yaml missing")

    def _names(self) -> list[str]:
        return [name for info in self._listed("") if (name := PurePosixPath(info.path).name) != LEASE]

    def _listed(self, folder: str) -> list[fs.FileInfo]:
        try:
            found: list[fs.FileInfo] = self._root.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        except Exception as error:
            raise StorageError(f"cannot read {self.name}: {one_line(error)}") from error
        return found

    def rollouts_elsewhere(self) -> Collection[int]:
        names = (PurePosixPath(info.path).name for info in self._listed(ROLLOUTS) if info.size)
        return {number for name in names if (number := iteration_of(name, ROLLOUT_SUFFIX)) is not None}

    @contextmanager
    def claimed(self) -> Iterator[Path]:
        try:
            self._filesystem.create_dir(self._path, recursive=True)
        except Exception as error:
            raise StorageError(f"cannot write to {self.name}: {one_line(error)}") from error
        lease = Lease(self._root, self.name)
        with lease.held(), self._mirrored(NOT_TO_RESUME, lease.require) as folder:
            yield folder

    @contextmanager
    def visited(self) -> Iterator[Path]:
        self.require_run()
        with self._mirrored(NOT_TO_LOOK, lambda: None) as folder:
            yield folder

    @contextmanager
    def _mirrored(self, leave_out: Collection[str], require: Callable[[], None]) -> Iterator[Path]:
        """A temporary folder with the run's name; it stays if its content could not be saved."""
        parent = Path(tempfile.mkdtemp(prefix="epd-ray-"))
        folder = parent / (PurePosixPath(self._path).name or "run")
        folder.mkdir()
        self._mirror, keep = Mirror(self._root, folder, self.name, require), False
        try:
            self._mirror.pull(leave_out)
            keep = True  # until it is saved
            try:
                yield folder
            except BaseException:
                keep = not self._saved("that was the last try")
                raise
            self._mirror.push()
            keep = False
        finally:
            if keep:
                log.warning("%s was not saved whole: its copy stays in %s", self.name, folder)
            else:
                shutil.rmtree(parent, ignore_errors=True)

    def save(self) -> None:
        self._saved("it is tried again at the next checkpoint")

    def _saved(self, when_failed: str) -> bool:
        """Whether the upload succeeded; a failure is logged with what happens next."""
        assert self._mirror is not None, "save() belongs inside claimed() or visited()"
        try:
            self._mirror.push()
        except StorageError as error:
            log.warning("%s: %s", error, when_failed)
            return False
        return True
