"""The record that every case returns, and the one way in which records are shown and kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from epd_ray.report import tables
from epd_ray.storage.run_directory import write_text
from epd_ray.telemetry.provenance import Provenance

Value = float | int | str | bool | None
Values = Mapping[str, Value]


@dataclass(frozen=True)
class Record:
    """What a case measured.

    The name of a value ends with its unit: `_s` or `seconds` are seconds, `_ms` milliseconds, `_mib` MiB, `_kib` KiB,
    `per_s` a number per second, `tflop` 10^12 operations and `tflops` 10^12 operations per second. A name without a
    unit is a count or a ratio. A name "a/b/figure" stands in the row "a/b" and the column "figure" of a table.

    Attributes:
        case: name of the case, a key of epd_ray.bench.cases.CASES.
        settings: the settings that the values depend on, such as the model and the number of images of a batch.
        values: the measured values; None stands for a value that does not exist.
        made_by: the command and the machine that measured the values.
    """

    case: str
    settings: Values
    values: Values
    made_by: Provenance = field(default_factory=Provenance.here)

    @property
    def figures(self) -> dict[str, Value]:
        """The settings and the values, as tables and files hold them."""
        return {**self.settings, **self.values}


def under(row: str, values: Values) -> dict[str, Value]:
    """The same values with names "row/figure", which puts them into one row of a table."""
    return {f"{row}/{name}": value for name, value in values.items()}


def show(record: Record) -> None:
    """Print a record as a table."""
    Console().print(tables.show(record.case, record.figures))


def keep(records: Sequence[Record], path: Path) -> None:
    """Write the records of one command to a JSON file that `epd-ray results` reads.

    Args:
        records: at least one record.
        path: the file, which is replaced as a whole.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    cases = {record.case: record.figures for record in records}
    write_text(path, json.dumps({"made_by": records[0].made_by.record(), "cases": cases}, indent=2) + "\n")
