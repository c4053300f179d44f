"""What a run keeps on disk: where each part lies, files that are whole or not there, metrics."""

import errno
import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from epd_ray.errors import RunDirectoryError

log = logging.getLogger(__name__)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PACKAGES = ("ray", "torch", "diffusers", "transformers", "numpy", "epd_ray")

HELD = ".lock"
UNFINISHED = {HELD, "versions.json", "prompts.json"}
"""What a run that was killed while its directory was made may have left; config.yaml comes last."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` when all is on the disk, or goes away.

    Raises:
        RunDirectoryError: the disk refuses; an earlier `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
        with suppress(OSError):  # some filesystems cannot
            _to_disk(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def unwritable(path: Path, error: OSError) -> RunDirectoryError:
    """What to say of a file that the disk refuses."""
    fix = " (make room and try again)" if error.errno in FULL else ""
    said = os.strerror(error.errno) if error.errno else error  # pyarrow's strerror tells more than a line needs
    return RunDirectoryError(f"cannot write {path}: {said}{fix}")


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Say which file, or at least which run at `path`, a full disk has refused.

    Raises:
        RunDirectoryError: instead of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise unwritable(Path(error.filename or path), error) from error


def _to_disk(path: Path) -> None:
    """Have a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all.

    Raises:
        RunDirectoryError: the disk refuses.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def refuse_others(place: str, names: Sequence[str]) -> None:
    """Refuse to begin a run at `place`, where there are files or folders of these names.

    Raises:
        RunDirectoryError: they are another run, or something else.
    """
    if "config.yaml" in names:
        raise RunDirectoryError(f"{place} holds another run: resume it, or name a new directory")
    if found := sorted(name for name in names if name not in UNFINISHED and not name.endswith(".tmp")):
        raise RunDirectoryError(f"{place} is not empty (it holds {found[0]!r}): name a new directory")


def package_versions() -> dict[str, str]:
    """Python's version and that of every package that can change a result."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass(frozen=True)
class RunDirectory:
    """Where each part of a run lies. `create` makes one, `open` checks one; the constructor only names paths."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, config_text: str, prompts_text: str | None = None) -> "RunDirectory":
        """Make the directory with config.yaml, versions.json and the prompts, or nothing at all.

        Args:
            path: absent, or an empty directory; what a creation that was killed has left is written again.
            config_text: the resolved configuration, YAML.
            prompts_text: the prompts of every split, JSON; None: no prompts.json.

        Raises:
            RunDirectoryError: the path is a file, holds another run or other files, or cannot be written.
        """
        run = cls(Path(path))
        made: list[Path] = []
        try:
            run.require_new()
            made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
            run.path.mkdir(parents=True, exist_ok=True)
            run._write_new(config_text, prompts_text)
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
        """An existing run.

        Raises:
            RunDirectoryError: no directory there, or one without config.yaml or versions.json.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise RunDirectoryError(f"{path} is not a directory, expected one that a run has made")
        if missing := [file.name for file in (run.config, run.versions) if not file.is_file()]:
            raise RunDirectoryError(f"{path} is not a run directory: {' and '.join(missing)} missing")
        return run

    def require_new(self) -> None:
        """Refuse a path that a new run cannot have.

        Raises:
            RunDirectoryError: it is a file, or holds another run or other files.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file, expected a new or empty directory")
        refuse_others(str(self.path), [path.name for path in self.path.iterdir()])

    def clear(self) -> None:
        """Remove all but the lock, which others could not see any more; whoever holds it ends with it."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != HELD:
                path.unlink()

    def _write_new(self, config_text: str, prompts_text: str | None) -> None:
        try:
            write_text(self.versions, json.dumps(package_versions(), indent=2) + "\n")
            if prompts_text is not None:
                write_text(self.prompts, prompts_text)
            write_text(self.config, config_text)  # last: its presence marks a run
        except RunDirectoryError:
            for path in (self.versions, self.prompts):
                path.unlink(missing_ok=True)
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
        run: an existing run directory; a torn last row goes, the others stay.
        keep_until: rows after this iteration go too, in both places.

    Raises:
        RunDirectoryError: the disk refuses.
    """

    def __init__(self, run: RunDirectory, keep_until: int | None = None) -> None:
        self._path, self._folder = run.metrics, run.tensorboard
        kept = [r for r in read_metrics(self._path) if keep_until is None or r["iteration"] <= keep_until]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        try:
            self._folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            if keep_until is not None:  # TensorBoard hides what earlier files have from there on
                restart = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=keep_until + 1, session_log=restart))
            self._events.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from error

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row.

        Args:
            row: finite scalars by name, with "iteration", which is TensorBoard's step.

        Raises:
            ValueError: a value that is not finite.
            RunDirectoryError: the disk refuses; metrics.jsonl is as it was.
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
                while rest:  # a disk that is nearly full takes a part of it
                    rest = rest[file.write(rest) :]
            except OSError as error:
                file.truncate(size)
                raise unwritable(self._path, error) from error

    def close(self) -> None:
        with suppress(OSError):  # every row was flushed, or has raised
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; none where the file is not there yet, and a last row torn by a crash left out.

    Raises:
        RunDirectoryError: a row before the last that is not JSON.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunDirectoryError(f"{path}, line {number}: not JSON ({error.msg})") from error
            log.warning("%s, line %d: torn by a crash, left out", path, number)
    return rows
