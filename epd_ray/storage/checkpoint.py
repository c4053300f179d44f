"""Checkpoints of a run. A file is written completely or not at all; the newest few and the best checkpoint are kept."""

import io
import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from epd_ray.errors import RunDirectoryError
from epd_ray.storage.run_directory import make_folder, numbered, unreadable, whole

log = logging.getLogger(__name__)

FORMAT = 4  # 1 had no validation curve; 2 had other random streams, and stored the medians of scales; 3 no origin
SUFFIX = ".pt"
PATTERN = f"iteration-{{:06d}}{SUFFIX}"
BEST = "best.pt"
State = dict[str, Any]
DAMAGE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, MemoryError),
    *(UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error),
)
"""Exceptions that zipfile and torch.load raise for a damaged checkpoint."""


class OtherFormatError(RunDirectoryError):
    """A checkpoint that another version of this package wrote."""


def save_checkpoint(folder: Path, iteration: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write iteration-NNNNNN.pt, and delete all other numbered checkpoints but the `keep` - 1 before it.

    Args:
        folder: folder of the run's checkpoints.
        iteration: number of learner updates so far.
        state: nested dicts and lists of numbers, strings and arrays, which load without unpickling.
        keep: number of numbered checkpoints to keep, at least 1; best.pt is not counted.

    Raises:
        RunDirectoryError: the file cannot be written; earlier checkpoints stay.
    """
    path = _write(folder / PATTERN.format(iteration), iteration, state)
    found = list(numbered(folder, SUFFIX).values())
    later = [other for other in found if other > path]  # damaged ones, or of updates that are being repeated
    for other in [*found[: len(found) - len(later)][:-keep], *later]:
        other.unlink()
    return path


def save_best(folder: Path, iteration: int, state: Mapping[str, Any]) -> Path:
    """Write best.pt, the state with the best reward on the validation prompts.

    Raises:
        RunDirectoryError: the file cannot be written; an earlier best.pt stays.
    """
    return _write(folder / BEST, iteration, state)


def _write(path: Path, iteration: int, state: Mapping[str, Any]) -> Path:
    make_folder(path.parent)
    data = io.BytesIO()  # torch.save to a file would hide the system's error
    torch.save({"format": FORMAT, "iteration": iteration, **_as_tensors(state)}, data)
    with whole(path) as partial:
        partial.write_bytes(data.getbuffer())
    return path


def load_newest(folder: Path, check: Callable[[State], None] = lambda state: None) -> State | None:
    """The newest checkpoint that can be read, or best.pt if no other can; None if there is no checkpoint.

    Damaged checkpoints are skipped with a warning.

    Args:
        folder: folder of the run's checkpoints.
        check: raises RunDirectoryError for a state that no run can go on from, which then counts as damaged.

    Raises:
        RunDirectoryError: all checkpoints are damaged, or the newest readable one has another format.
    """
    paths = [*reversed(numbered(folder, SUFFIX).values()), *folder.glob(BEST)]
    for path in paths:
        try:
            state = read_checkpoint(path)
            check(state)
        except OtherFormatError:
            raise
        except RunDirectoryError as error:
            log.warning("checkpoint %s is damaged (%s): using the one before", path.name, error)
        else:
            return state
    if paths:
        raise RunDirectoryError(
            f"all {len(paths)} checkpoints in {folder} are damaged: put one back from a copy, or delete the folder to "
            "begin this run anew"
        )
    return None


def load_earlier(folder: Path, iteration: int, check: Callable[[State], None]) -> list[State]:
    """The numbered checkpoints before an iteration that can be read, in order; the others are passed over."""
    found = []
    for number, path in numbered(folder, SUFFIX).items():
        with suppress(RunDirectoryError):
            if number < iteration:
                check(state := read_checkpoint(path))
                found.append(state)
    return found


def read_checkpoint(path: Path) -> State:
    """The state in a checkpoint, with numpy arrays.

    Raises:
        OtherFormatError: another version of epd_ray wrote the file.
        RunDirectoryError: the file is missing or damaged, or is no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
            if (broken := archive.testzip()) is not None:
                raise zipfile.BadZipFile(broken)
        state = _as_arrays(torch.load(path, map_location="cpu", weights_only=True))
    except DAMAGE as error:
        raise unreadable(path, error) from error
    kinds = {"format": int, "iteration": int}
    if not isinstance(state, dict) or any(type(state.get(key)) is not kind for key, kind in kinds.items()):
        raise RunDirectoryError(f"{path} is no checkpoint of a run: it has no format and iteration")
    _require_format(path, state["format"])
    return state


def _require_format(path: Path, found: int) -> None:
    if found > FORMAT:
        raise OtherFormatError(
            f"{path} was written by a newer epd_ray (checkpoint format {found}, this one reads up to {FORMAT}): "
            "update epd_ray"
        )
    if found < FORMAT:
        raise OtherFormatError(
            f"{path} was written by an older epd_ray (checkpoint format {found}, this one goes on from {FORMAT}): "
            "finish the run with the versions in its versions.json, or begin it anew"
        )


def changed_versions(saved: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The packages whose versions differ, such as "torch 2.12 before, 2.13 now"; None if all are equal."""
    changed = [name for name in now if now[name] != saved.get(name)]
    return ", ".join(f"{name} {saved.get(name, 'absent')} before, {now[name]} now" for name in changed) or None


def _as_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _as_tensors(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_tensors(v) for v in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.item() if isinstance(value, np.generic) else value


def _as_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _as_arrays(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_as_arrays(v) for v in value]
    return value.numpy() if isinstance(value, torch.Tensor) else value
