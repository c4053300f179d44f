"""How figures came about: the commands, and the machine that they ran on."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from epd_ray.storage.run_directory import write_text
from epd_ray.telemetry.machine import machine

MADE_BY = "made_by.json"


@dataclass(frozen=True)
class Provenance:
    """Of some figures.

    Attributes:
        commands: in the order in which they ran, each once.
        machine: see epd_ray.telemetry.machine.
    """

    commands: tuple[str, ...]
    machine: Mapping[str, JsonValue]

    @classmethod
    def here(cls, earlier: tuple[str, ...] = ()) -> "Provenance":
        """Of this process, after earlier commands."""
        command = shlex.join(["epd-ray", *sys.argv[1:]])
        return cls(tuple(dict.fromkeys([*earlier, command])), machine())

    def record(self) -> dict[str, JsonValue]:
        """Ready for JSON."""
        return {"commands": list(self.commands), "machine": dict(self.machine)}

    @classmethod
    def read(cls, record: Mapping[str, JsonValue]) -> "Provenance":
        """From `record`.

        Raises:
            ValueError: no such record.
        """
        commands, about = (record.get(name) if isinstance(record, dict) else None for name in ("commands", "machine"))
        if not isinstance(commands, list) or not isinstance(about, dict):
            raise ValueError("commands is no list, or machine no mapping")
        return cls(tuple(map(str, commands)), about)

    @property
    def where(self) -> str:
        """The machine in a line."""
        m = self.machine
        gpus = m.get("gpus") or []
        assert isinstance(gpus, list)
        counted = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)] or ["no GPU"]
        versions = m["versions"]
        assert isinstance(versions, dict)
        named = (f"{package} {versions[package]}" for package in ("python", "torch", "ray", "epd_ray"))
        return ", ".join([f"{m['cores']} cores of {m['cpu']}", *counted, *named])


def sign(folder: Path) -> None:
    """Add this process's command to the folder's made_by.json.

    Raises:
        RunDirectoryError: the disk refuses.
    """
    path = folder / MADE_BY
    earlier = signed_by(folder).commands if path.is_file() else ()
    write_text(path, json.dumps(Provenance.here(earlier).record(), indent=2) + "\n")


def signed_by(folder: Path) -> Provenance:
    """What `sign` left.

    Raises:
        OSError, ValueError: nothing, or damaged.
    """
    return Provenance.read(json.loads((folder / MADE_BY).read_text(encoding="utf-8")))
