"""Measurements that take long, each kept in a file when it is done: a benchmark that was stopped goes on from there."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from epd_ray.config.loading import RunConfig, first_change
from epd_ray.errors import RunDirectoryError
from epd_ray.storage.run_directory import write_text

FOLDER = Path("bench")
DECIDING = ("seed", "backbone", "solver", "prompts", "rewards", "distill", "rdpo")
"""What of a run decides its figures, beside the size of its batches: not where it runs, nor what it writes."""
Measured = TypeVar("Measured")


def kept(
    path: Path, config: RunConfig, rules: dict[str, Any], kind: type[Measured], measure: Callable[[], Measured]
) -> Measured:
    """The measurement that the file holds, or else a new one, written there.

    Args:
        path: of the JSON file; its folder is made.
        config: of the run that is measured; what a file says nothing of, because it came later, had its default.
        rules: what else decides the measurement, as JSON values.
        kind: a dataclass whose fields JSON can hold.
        measure: makes one.

    Raises:
        RunDirectoryError: the file holds a measurement of other settings, or none of this version's.
    """
    settings = {"run": _deciding(config.model_dump(mode="json")), **rules}
    if path.exists():
        try:
            held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            run = RunConfig.model_validate(_deciding(held["settings"]["run"]))
            measured = kind(**held["measured"])
        except (OSError, ValueError, KeyError, TypeError) as error:  # of what the file holds, in any shape
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
