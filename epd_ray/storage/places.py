"""Where runs lie: a local directory, or one on any filesystem of pyarrow or fsspec, worked on in a local copy.

A remote run is the state of its last checkpoint: `save` uploads what changed since the last time, checkpoints after
everything that they count on, each file under another name that is then moved. An upload that fails is repeated, and
then left for the next checkpoint with a warning; at the end of the run it is an error. The copy is a new folder in the
system's temporary directory (TMPDIR), which stays when it was not saved whole.
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
from epd_ray.storage.run_directory import RunDirectory, refuse_others, unwritable

log = logging.getLogger(__name__)

NOT_TO_RESUME = ("rollouts", "tensorboard")
NOT_TO_LOOK = (*NOT_TO_RESUME, "checkpoints")


class Place(Protocol):
    """Where a run lies or is to lie.

    Attributes:
        name: as the user gave it.
    """

    name: str

    def begun(self) -> bool:
        """Whether there is a run."""
        ...

    def require_new(self) -> None:
        """Raises RunDirectoryError where no new run can begin."""
        ...

    def require_run(self) -> None:
        """Raises RunDirectoryError where there is no run."""
        ...

    def claimed(self) -> AbstractContextManager[Path]:
        """A local folder with all that a run needs to go on, for this process alone; saved in the end.

        Where a run may be going on elsewhere, it is watched for a minute: without a sign of life it counts as dead.

        Raises:
            RunDirectoryError: another run holds it.
        """
        ...

    def visited(self) -> AbstractContextManager[Path]:
        """A local folder without rollouts and checkpoints, beside a run that may be going on; saved in the end."""
        ...

    def save(self) -> None:
        """Bring the place up to date with the local folder, as far as it can be reached."""
        ...


def is_uri(place: str | Path) -> bool:
    """Whether this names a filesystem: s3://, gs://, hdfs://, file://, memory:// and the like."""
    return "://" in str(place)


def place_of(where: str | Path) -> Place:
    """The place of a path or URI.

    Raises:
        StorageError: a URI whose filesystem is unknown or cannot be opened.
    """
    return RemotePlace(str(where), *open_filesystem(str(where))) if is_uri(where) else LocalPlace(Path(where))


def inside(where: str | Path, part: str | Path) -> str:
    """The name of a part of a run, for people."""
    if not is_uri(where):
        return str(Path(where, part))
    return f"{str(where).partition('?')[0].rstrip('/')}/{PurePosixPath(part)}"


@contextmanager
def reading(place: Place, folder: Path) -> Iterator[None]:
    """Say of the place what is wrong with a file that was read from its folder."""
    try:
        yield
    except EpdRayError as error:
        error.args = tuple(str(arg).replace(str(folder), place.name) for arg in error.args)
        raise


class LocalPlace:
    """A directory."""

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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error
        lock = RunDirectory(self.path).lock
        with held(lock, self.name) as file:
            try:
                yield self.path
            finally:
                with suppress(OSError):  # a run that came to nothing leaves nothing
                    if is_at(file, lock) and [path.name for path in self.path.iterdir()] == [lock.name]:
                        lock.unlink()
                        for folder in made:
                            folder.rmdir()

    @contextmanager
    def visited(self) -> Iterator[Path]:
        yield self.path

    def save(self) -> None:
        pass


class RemotePlace:
    """A folder on another filesystem.

    Args:
        uri: of the folder.
        filesystem: that the URI names.
        path: of the folder in it.
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
        try:
            found = self._root.get_file_info(fs.FileSelector("", allow_not_found=True))
        except Exception as error:
            raise StorageError(f"cannot read {self.name}: {one_line(error)}") from error
        return [name for info in found if (name := PurePosixPath(info.path).name) != LEASE]

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
        """A temporary folder of the run's name; it stays when its content could not be saved."""
        above = Path(tempfile.mkdtemp(prefix="epd-ray-"))
        folder = above / (PurePosixPath(self._path).name or "run")
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
                shutil.rmtree(above, ignore_errors=True)

    def save(self) -> None:
        self._saved("it is tried again at the next checkpoint")

    def _saved(self, otherwise: str) -> bool:
        assert self._mirror is not None, "save() belongs inside claimed() or visited()"
        try:
            self._mirror.push()
        except StorageError as error:
            log.warning("%s: %s", error, otherwise)
            return False
        return True
