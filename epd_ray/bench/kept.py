"""Measurements that take long, each kept in a file when it is done: a benchmark that was stopped goes on from there."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from epd_ray.config import first_change
from epd_ray.errors import RunDirectoryError
from epd_ray.store import write_text

FOLDER = Path("bench")
Measured = TypeVar("Measured")


def kept(path: Path, settings: dict[str, Any], kind: type[Measured], measure: Callable[[], Measured]) -> Measured:
    """The measurement that the file holds, or else a new one, written there.

    Args:
        path: of the JSON file; its folder is made.
        settings: all that decides the measurement, defaults too, as JSON values.
        kind: a dataclass whose fields JSON can hold.
        measure: makes one.

    Raises:
        RunDirectoryError: the file holds a measurement of other settings, or something else.
    """
    if path.exists():
        try:
            held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            change, values = first_change(held["settings"], settings), held["measured"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirectoryError(f"{path} holds no measurement: move it away, or name a new folder") from error
        if change is not None:
            raise RunDirectoryError(f"{path} was measured with other settings ({change}): name a new folder")
        return kind(**values)
    measured = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"settings": settings, "measured": asdict(measured)}))  # type: ignore[call-overload]
    return measured
