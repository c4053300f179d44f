"""Files of finished measurements that take long, from which a case that was stopped goes on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from epd_ray.config.problems import first_change
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import RunDirectoryError
from epd_ray.storage.run_directory import write_text

FOLDER = Path("bench")
DECIDING = ("seed", "backbone", "solver", "prompts", "rewards", "distill", "rdpo")
"""Sections of a run's configuration that decide what is measured. The size of its batches does too; where the run takes
place, and what it writes, does not."""
Measured = TypeVar("Measured")


def kept(
    path: Path, config: RunConfig, rules: dict[str, Any], kind: type[Measured], measure: Callable[[], Measured]
) -> Measured:
    """Read a measurement from its file, or measure and write the file where there is none.

    Args:
        path: the JSON file, whose folder is made where it is missing.
        config: configuration of the run that is measured. A key that an older file does not have counts as its default.
        rules: everything else that decides the measurement, as JSON values.
        kind: a dataclass whose fields are JSON values.
        measure: makes a measurement.

    Raises:
        RunDirectoryError: the file holds a measurement of other settings or of another version, or cannot be written.
    """
    settings = {"run": _deciding(config.model_dump(mode="json")), **rules}
    if path.exists():
        try:
            held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            run = RunConfig.model_validate(_deciding(held["settings"]["run"]))
            measured = kind(**held["measured"])
        except (OSError, ValueError, KeyError, TypeError) as error:  # the file may hold anything
            raise RunDirectoryError(
                f"{path} holds no measurement of this version: move it away, or name a new folder"
            ) from error
        change = first_change(held["settings"] | {"run": _deciding(run.model_dump(mode="json"))}, settings)
        if change is not None:
            raise RunDirectoryError(f"{path} was measured with other settings ({change}): name a new folder")
        return measured
    measured = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"settings": settings, "measured": asdict(measured)}))  # type: ignore[call-overload]
    return measured


def _deciding(run: Mapping[str, Any]) -> dict[str, Any]:
    batches = {"images_per_job": run["cluster"]["images_per_job"]}
    return {**{name: run[name] for name in DECIDING}, "cluster": batches}
