"""Cases one after another, with what they ran on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from epd_ray.bench.cases import CASES, OF_MODELS, SEEDED, Record, measured
from epd_ray.bench.kept import FOLDER
from epd_ray.bench.models import RANDOM, Subject
from epd_ray.bench.random_models import Size
from epd_ray.errors import ConfigError
from epd_ray.registry import did_you_mean
from epd_ray.report.tables import show
from epd_ray.storage.run_directory import write_text
from epd_ray.telemetry.provenance import Provenance


@dataclass(frozen=True)
class Options:
    """What cases may be told; see `measured`."""

    model: str | None = None
    size: Size | None = None
    compile: bool | None = None
    seeds: int | None = None
    folder: Path = FOLDER


def run(names: Sequence[str], options: Options | None = None, out: Path | None = None) -> dict[str, Record]:
    """Measure, print a table per case, and write all records whenever one is there.

    Args:
        names: of the cases; none: all of them, or all that take a model where one is given.
        options: for those that they concern.
        out: JSON file, `made_by` and `cases`.

    Returns:
        Case -> record.

    Raises:
        ConfigError: an unknown case or model, an option for cases that take none, or no folder for `out`.
        RunDirectoryError: `out` cannot be written.
    """
    options = options or Options()
    of_model = options.model is not None or options.size is not None or options.compile is not None
    chosen = list(names) or list(OF_MODELS if of_model else CASES)
    problems = [f"unknown case {name!r}{did_you_mean(name, CASES)}" for name in chosen if name not in CASES]
    if of_model:
        takes = ", ".join(OF_MODELS)
        others = [name for name in chosen if name in CASES and name not in OF_MODELS]
        problems += [f"case {name} takes no --model, --size or --compile: give them to {takes}" for name in others]
    if options.model is None and chosen != ["batching"]:  # whose models are all random
        given = [f"--{name}" for name, value in (("size", options.size), ("compile", options.compile)) if value]
        problems += [f"{option} needs --model, a random one, such as sd3{RANDOM}" for option in given]
    if options.seeds is not None and not set(chosen) & set(SEEDED):
        problems.append(f"none of {', '.join(chosen)} takes --seeds: give them to {', '.join(SEEDED)}")
    if out is not None and not out.parent.is_dir():
        problems.append(f"--out is {out}, {out.parent} is no folder: make it first")
    if problems:
        raise ConfigError(problems)
    if options.model is not None:
        Subject(options.model, options.size, compile=bool(options.compile))  # a wrong name ends it here
    console, made_by, records = Console(), Provenance.here().record(), {}
    for name in chosen:
        records[name] = measured(name, options.seeds, options.folder, options.model, options.size, options.compile)
        console.print(show(name, records[name]))
        if out is not None:
            write_text(out, json.dumps({"made_by": made_by, "cases": records}, indent=2) + "\n")
    return records
