"""Records with which commands, and on which machine, figures were made."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from epd_ray.errors import RunDirectoryError
from epd_ray.storage.documents import read_json
from epd_ray.storage.run_directory import write_text
from epd_ray.telemetry.machine import machine

MADE_BY = "made_by.json"


@dataclass(frozen=True)
class Provenance:
    """The commands and the machine that made some figures.

    Attributes:
        commands: the commands in the order in which they first ran, without duplicates.
        machine: description of the machine by epd_ray.telemetry.machine.
    """

    commands: tuple[str, ...]
    machine: Mapping[str, JsonValue]

    @classmethod
    def here(cls, earlier: tuple[str, ...] = ()) -> "Provenance":
        """The provenance of this process, whose command comes after `earlier` ones."""
        command = shlex.join(["epd-ray", *sys.argv[1:]])
        return cls(tuple(dict.fromkeys([*earlier, command])), machine())

    def record(self) -> dict[str, JsonValue]:
        """The provenance as JSON values."""
        return {"commands": list(self.commands), "machine": dict(self.machine)}

    @classmethod
    def read(cls, record: Mapping[str, JsonValue]) -> "Provenance":
        """The provenance from the JSON values that `record` returned.

        Raises:
            ValueError: the record holds no list `commands`, or no mapping `machine` with what `where` needs.
        """
        record = record if isinstance(record, dict) else {}
        commands, about = (record.get(name) for name in ("commands", "machine"))
        if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
            raise ValueError("commands is not a list of texts")
        versions = about.get("versions") if isinstance(about, dict) else None
        if not isinstance(about, dict) or not isinstance(versions, dict) or not {"cores", "cpu"} <= about.keys():
            raise ValueError("machine is no mapping with cores, cpu and versions")
        gpus = about.get("gpus") or []
        if not isinstance(gpus, list) or not all(isinstance(gpu, str) for gpu in gpus):
            raise ValueError("gpus is not a list of texts")
        return cls(tuple(map(str, commands)), about)

    @property
    def where(self) -> str:
        """One line that describes the machine: cores, processor, GPUs and package versions."""
        m = self.machine
        gpus = m.get("gpus") or []
        assert isinstance(gpus, list)
        counted = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)] or ["no GPU"]
        versions = m["versions"]
        assert isinstance(versions, dict)
        named = (f"{package} {versions.get(package, 'unknown')}" for package in ("python", "torch", "ray", "epd_ray"))
        return ", ".join([f"{m['cores']} cores of {m['cpu']}", *counted, *named])


def sign(folder: Path) -> None:
    """Add this process's command to the folder's made_by.json.

    Raises:
        RunDirectoryError: the file cannot be written, or an earlier one is damaged.
    """
    path = folder / MADE_BY
    earlier = signed_by(folder).commands if path.is_file() else ()
    write_text(path, json.dumps(Provenance.here(earlier).record(), indent=2) + "\n")


def signed_by(folder: Path) -> Provenance:
    """The provenance that `sign` wrote into a folder.

    Raises:
        RunDirectoryError: made_by.json is missing or damaged.
    """
    fix = "measure it again without this file"
    record = read_json(folder / MADE_BY, RunDirectoryError, fix)
    try:
        return Provenance.read(record)
    except ValueError as error:
        raise RunDirectoryError(f"{folder / MADE_BY} is damaged: {error} ({fix})") from error
