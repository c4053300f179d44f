"""Several cases one after another, as `epd-ray bench` runs them."""

from collections.abc import Sequence
from pathlib import Path

from epd_ray.bench.cases import CASES, HEADROOM, OF_MODELS, SEEDED, Options, measured
from epd_ray.bench.models import RANDOM
from epd_ray.bench.record import Record, keep, show
from epd_ray.errors import ConfigError
from epd_ray.registry import did_you_mean


def run(names: Sequence[str], options: Options | None = None, out: Path | None = None) -> list[Record]:
    """Measure cases and print each record; a file then holds all records up to this one, so that a stop loses none.

    Args:
        names: names of cases; without any all are measured, or all that take a model where one is given.
        options: options for the cases that take them.
        out: JSON file for the records; None means no file.

    Raises:
        ConfigError: a case or a model is unknown, no case takes an option, or the folder of `out` does not exist.
        RunDirectoryError: `out` cannot be written.
    """
    options = options or Options()
    of_model = options.model is not None or options.size is not None or options.compile is not None
    chosen = list(names) or list(OF_MODELS if of_model else CASES)
    if problems := _problems(chosen, options, out):
        raise ConfigError(problems)
    if chosen != [HEADROOM]:  # which takes any model
        options.subjects(())  # refuses an unknown model before anything is measured
    records: list[Record] = []
    for name in chosen:
        records.append(measured(name, options))
        show(records[-1])
        if out is not None:
            keep(records, out)
    return records


def _problems(chosen: Sequence[str], options: Options, out: Path | None) -> list[str]:
    problems = [f"unknown case {name!r}{did_you_mean(name, CASES)}" for name in chosen if name not in CASES]
    of_random = [f"--{name}" for name, value in (("size", options.size), ("compile", options.compile)) if value]
    if options.model is not None or of_random:
        takes = ", ".join(OF_MODELS)
        others = [name for name in chosen if name in CASES and name not in (*OF_MODELS, HEADROOM)]
        problems += [f"case {name} takes no --model, --size or --compile: give them to {takes}" for name in others]
    if options.model is None and list(chosen) != ["batching"]:  # which measures every random model without --model
        problems += [f"{option} needs --model, a random one, such as sd3{RANDOM}" for option in of_random]
    if HEADROOM not in chosen and (given := [n for n in options.of_headroom if n != "overrides" or options.overrides]):
        problems.append(f"{', '.join(given)} given, but only {HEADROOM} takes them: name that case")
    if options.seeds is not None and not set(chosen) & set(SEEDED):
        problems.append(f"none of {', '.join(chosen)} takes --seeds: give them to {', '.join(SEEDED)}")
    if out is not None and not out.parent.is_dir():
        problems.append(f"--out is {out}, but the folder {out.parent} does not exist: make it first")
    return problems
