"""Looking at solver tables and moving them between formats: what `epd-ray tables` does."""

import json
import os
from itertools import pairwise
from pathlib import Path

from pydantic import JsonValue
from rich.console import Console, Group, RenderableType
from rich.table import Table

from epd_ray.errors import TableError
from epd_ray.solvers import Solver
from epd_ray.solvers.presets import NAMES
from epd_ray.solvers.reference import SUFFIX, read_reference
from epd_ray.solvers.table import COLUMN_NAMES


def load_solver(source: str | os.PathLike[str]) -> Solver:
    """A solver from wherever one may come from.

    Args:
        source: a preset's name, a directory or file of ours, a *.pkl of the reference, or a hub id.

    Returns:
        The solver, float64.

    Raises:
        TableError: nothing there, or nothing that is a solver.
    """
    return read_reference(source) if Path(source).suffix == SUFFIX else Solver.from_pretrained(source)


def list_presets() -> Table:
    """What comes with the package, one row each."""
    table = Table("name", "backbone", "N", "K", "parallel NFE", "evaluations", "resolution", "guidance", box=None)
    table.pad_edge, table.collapse_padding = False, True  # so that 80 columns are enough
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for name in NAMES:
        solver = Solver.from_pretrained(name)
        counts = (solver.table.intervals, solver.table.points, solver.parallel_nfe, solver.model_evals)
        meta = [_text(solver.meta.get(key)) for key in ("backbone", "resolution", "guidance_scale")]
        table.add_row(name, meta[0], *map(str, counts), *meta[1:])
    return table


def show_solver(source: str | os.PathLike[str]) -> Group:
    """A solver as a page of text: its costs, what it was made for, and its table.

    Args:
        source: see `load_solver`.

    Raises:
        TableError: see `load_solver`.
    """
    solver = load_solver(source)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("parallel NFE", f"{solver.parallel_nfe} calls that wait for each other")
    facts.add_row("evaluations", f"{solver.model_evals} an image; twice the passes where guidance mixes two")
    facts.add_row("form", _text(solver.form))
    if solver.afs:
        facts.add_row("first step", "analytical")
    if solver.order > 1:
        facts.add_row("slope", f"multistep, order {solver.order}")
    for key, value in solver.meta.items():
        facts.add_row(key, _text(value))
    return Group(facts, "", _intervals(solver))


def import_reference(file: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Turn a *.pkl of the reference into a directory of ours, running nothing that is in it.

    Args:
        file: the *.pkl.
        out: made where missing; must hold nothing.

    Returns:
        The path of solver.json.

    Raises:
        TableError: a file that is not one of the reference, or an `out` that holds something.
    """
    if Path(file).suffix != SUFFIX:
        raise TableError(f"{os.fspath(file)!r} is no {SUFFIX} file (for any other solver: epd-ray tables convert)")
    return convert(file, out)


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write any solver as a directory of ours.

    Args:
        source: see `load_solver`.
        out: made where missing; must hold nothing.

    Returns:
        The path of solver.json.

    Raises:
        TableError: see `load_solver`; an `out` that holds something, is no directory, or cannot be written.
    """
    solver, folder = load_solver(source), Path(out)
    try:
        if folder.exists() and not folder.is_dir():
            raise TableError(f"{folder} is a file, expected a directory (choose another --out)")
        if folder.exists() and any(folder.iterdir()):
            raise TableError(f"{folder} is not empty (choose another --out)")
        return solver.save_pretrained(folder)
    except OSError as error:
        raise TableError(f"{folder} cannot be written: {error.strerror or error} (choose another --out)") from error


def show(content: RenderableType) -> None:
    """Print to the terminal."""
    Console().print(content, highlight=False)


def _intervals(solver: Solver) -> Table:
    table = solver.table
    columns = table.columns()
    found = Table("interval", "sigma", *(COLUMN_NAMES[name] for name in columns))
    for i, (a, b) in enumerate(pairwise(solver.sigmas.tolist())):
        values = (" ".join(f"{v:.4f}" for v in rows[i].tolist()) for rows in columns.values())
        found.add_row(str(i + 1), f"{a:.5g} to {b:.5g}", *values)
    return found


def _text(value: JsonValue) -> str:
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
