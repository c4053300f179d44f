"""A run's directory: paths of its parts, files that are written completely or not at all, and the metrics log."""

import errno
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, TracebackType

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from epd_ray.errors import RunDirectoryError, shown

log = logging.getLogger(__name__)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of a full disk, an exhausted quota, a too large file
PACKAGES = ("ray", "torch", "diffusers", "transformers", "numpy", "epd_ray")

HELD = ".lock"
ROLLOUT_SUFFIX = ".parquet"
UNFINISHED = {HELD, "versions.json", "prompts.json", "origin.json"}
"""Files that may be left when a run was killed while it created its directory; config.yaml is written after them."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` when the block ends, or removed when the block raises.

    Raises:
        RunDirectoryError: the file cannot be written; an earlier file at `path` stays.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        with suppress(OSError):  # some filesystems cannot sync a directory
            _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def unwritable(path: Path, error: OSError) -> RunDirectoryError:
    """The error for a file that cannot be written; a full disk adds the fix."""
    fix = " (make room and try again)" if error.errno in FULL else ""
    reason = os.strerror(error.errno) if error.errno else error  # pyarrow's own strerror is longer than a line
    return RunDirectoryError(f"cannot write {path}: {reason}{fix}")


def unreadable(path: Path, error: Exception) -> RunDirectoryError:
    """The error for a file that cannot be read: the file, and what is wrong, in one line."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
    return RunDirectoryError(f"{path} cannot be read: {reason} (move it away, or put it back from a copy)")


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents.

    Raises:
        RunDirectoryError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """The files of iterations, such as iteration-000001.parquet, by their numbers, in order; strangers are left out."""
    named = [(iteration_of(path.name, suffix), path) for path in folder.iterdir()] if folder.is_dir() else []
    return dict(sorted((number, path) for number, path in named if number is not None))


def iteration_of(name: str, suffix: str) -> int | None:
    """The number in the name of an iteration's file, such as iteration-000001.parquet; None in any other name."""
    match = re.fullmatch(rf"iteration-(\d{{6,15}}){re.escape(suffix)}", name, re.ASCII)
    return int(match[1]) if match else None


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Replace the system's error for a full disk by one that names the file, or `path` if the file is unknown.

    Raises:
        RunDirectoryError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise unwritable(Path(error.filename or path), error) from error


def _sync(path: Path) -> None:
    """Write a file's content, or a directory's entries, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file completely or not at all.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def refuse_others(place: str, names: Sequence[str]) -> None:
    """Refuse to begin a run in a directory that is not empty.

    Args:
        place: path or URI of the directory, for messages.
        names: names of the files and folders in it.

    Raises:
        RunDirectoryError: the directory holds another run, or other files.
    """
    if "config.yaml" in names:
        raise RunDirectoryError(f"{place} holds another run: resume it, or name a new directory")
    if found := sorted(name for name in names if name not in UNFINISHED and not name.endswith(".tmp")):
        raise RunDirectoryError(f"{place} is not empty (it holds {shown(found[0])}): name a new directory")


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that can change a result, by name."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run's parts. `create` makes a run's directory, `open` checks one; the constructor does neither."""

    path: Path

    @classmethod
    def create(
        cls, path: str | Path, config_text: str, texts: Mapping[str, str] = MappingProxyType({})
    ) -> "RunDirectory":
        """Make the directory with config.yaml, versions.json and further files, or leave nothing behind.

        Args:
            path: a path that does not exist or is an empty directory; files left by a killed creation are overwritten.
            config_text: the resolved configuration in YAML.
            texts: the names of further files, such as prompts.json, with their texts.

        Raises:
            RunDirectoryError: the path is a file, holds another run or other files, or cannot be written.
        """
        run = cls(Path(path))
        made: list[Path] = []
        try:
            run.require_new()
            made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
            run.path.mkdir(parents=True, exist_ok=True)
            run._write_new(config_text, texts)
        except (OSError, RunDirectoryError) as error:
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
            if isinstance(error, RunDirectoryError):
                raise
            raise RunDirectoryError(f"cannot create run directory {path}: {error.strerror or error}") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """The directory of an existing run.

        Raises:
            RunDirectoryError: the path is not a directory, or config.yaml or versions.json is missing in it.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise RunDirectoryError(f"{path} is not a directory, expected the directory of a run")
        if missing := [file.name for file in (run.config, run.versions) if not file.is_file()]:
            raise RunDirectoryError(f"{path} is not a run directory: {' and '.join(missing)} missing")
        return run

    def require_files(self) -> None:
        """Refuse folders where a run that goes on will write files.

        Raises:
            RunDirectoryError: there is one.
        """
        own = [self.prompts, self.origin, self.metrics, self.validation, self.stages, self.report]
        own += [self.evaluation, self.evaluation_rows, *numbered(self.rollouts, ".parquet").values()]
        for path in (*own, *self.checkpoints.glob("*.pt")):
            if path.is_dir():
                raise RunDirectoryError(f"{path} is a directory, but the run keeps a file there: move it away")

    def strangers(self) -> list[Path]:
        """What lies among the rollouts and checkpoints, and is none."""
        found = [path for folder in (self.rollouts, self.checkpoints) if folder.is_dir() for path in folder.iterdir()]
        own = {*numbered(self.rollouts, ".parquet").values(), *numbered(self.checkpoints, ".pt").values()}
        own.add(self.checkpoints / "best.pt")
        return sorted(path for path in found if path not in own and not path.name.startswith("."))

    def require_new(self) -> None:
        """Refuse a path that a new run cannot use.

        Raises:
            RunDirectoryError: the path is a file, or holds another run or other files.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file, expected a new or empty directory")
        refuse_others(str(self.path), [path.name for path in self.path.iterdir()])

    def clear(self) -> None:
        """Remove everything but the lock file, which other processes must still find while this process holds it."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != HELD:
                path.unlink()

    def _write_new(self, config_text: str, texts: Mapping[str, str]) -> None:
        first = {self.versions.name: json.dumps(package_versions(), indent=2) + "\n", **texts}
        try:
            for name, text in first.items():
                write_text(self.path / name, text)
            write_text(self.config, config_text)  # written last, because its presence marks a run
        except RunDirectoryError:
            for name in first:
                (self.path / name).unlink(missing_ok=True)
            raise

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.json"

    @property
    def origin(self) -> Path:
        return self.path / "origin.json"

    @property
    def lock(self) -> Path:
        return self.path / HELD

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def distilled(self) -> Path:
        return self.path / "distilled"

    @property
    def solver(self) -> Path:
        return self.path / "solver"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def samples(self) -> Path:
        return self.images / "samples"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        return self.path / "validation.parquet"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def stages(self) -> Path:
        return self.path / "stages.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluation_rows(self) -> Path:
        return self.path / "evaluation.parquet"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


class MetricsLog:
    """Appends a run's scalars to metrics.jsonl and to TensorBoard.

    Args:
        run: an existing run directory; rows of its metrics.jsonl that are damaged are removed.
        keep_until: rows of later iterations are removed from metrics.jsonl and hidden in TensorBoard; None keeps all.

    Raises:
        RunDirectoryError: a file cannot be read or written.
    """

    def __init__(self, run: RunDirectory, keep_until: int | None = None) -> None:
        self._path, self._folder = run.metrics, run.tensorboard
        kept = [r for r in read_metrics(self._path) if keep_until is None or r["iteration"] <= keep_until]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        try:
            self._folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            if keep_until is not None:  # this event makes TensorBoard hide later steps of earlier files
                restart = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=keep_until + 1, session_log=restart))
            self._events.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from error

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row.

        Args:
            row: finite scalars by name, among them "iteration", which becomes TensorBoard's step.

        Raises:
            ValueError: a value is not finite.
            RunDirectoryError: a file cannot be written; metrics.jsonl then holds no part of the row, unless only
                TensorBoard's file failed.
        """
        for name, value in row.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {name} is {value} at iteration {row['iteration']}, expected a finite number")
        step = int(row["iteration"])
        scalars = {name: value if isinstance(value, int) else float(value) for name, value in row.items()}
        self._append(json.dumps(scalars | {"iteration": step}) + "\n")
        try:
            for name, value in scalars.items():
                if name != "iteration":
                    self._events.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
            self._events.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from error

    def _append(self, line: str) -> None:
        with self._path.open("ab", buffering=0) as file:
            size, rest = file.tell(), line.encode()
            try:
                while rest:  # a nearly full disk writes only a part
                    rest = rest[file.write(rest) :]
            except OSError as error:
                file.truncate(size)
                raise unwritable(self._path, error) from error

    def close(self) -> None:
        with suppress(OSError):  # every row has been flushed already
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; empty if the file does not exist.

    A row that a crash left incomplete, or that is no mapping of names to finite numbers with a whole "iteration", is
    left out with a warning.

    Raises:
        RunDirectoryError: the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
    except OSError as error:
        raise unreadable(path, error) from error
    rows = [_row(line) for line in lines]
    if wrong := [number for number, row in enumerate(rows, start=1) if row is None]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        log.warning("%s, line %d%s: no row of numbers by name, and left out", path, wrong[0], more)
    return [row for row in rows if row is not None]


def _row(line: str) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("iteration")) is not int or row["iteration"] < 0:
        return None
    return row if all(_is_number(value) for value in row.values()) else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
