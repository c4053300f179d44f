"""Checkpoints of a run: whole or not there, a few kept, the newest readable one wins."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)
PATTERN = "iteration-{:06d}.pt"


def save_checkpoint(folder: Path, iteration: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write iteration-NNNNNN.pt and drop all but the newest `keep`.

    Args:
        folder: of the run's checkpoints.
        iteration: number of updates done.
        state: nested dicts and lists of numbers, strings and arrays; nothing that needs unpickling.
        keep: at least 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PATTERN.format(iteration)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(_as_tensors(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in sorted(folder.glob("iteration-*.pt"))[:-keep]:
        old.unlink()
    return path


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None; a damaged one is passed over with a warning."""
    for path in sorted(folder.glob("iteration-*.pt"), reverse=True):
        try:
            state: dict[str, Any] = _as_arrays(torch.load(path, weights_only=True))
            return state
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is damaged (%s): using the one before", path.name, type(error).__name__)
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            log.warning("checkpoint %s is damaged (UnpicklingError): using the one before", path.name)
    return None


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
