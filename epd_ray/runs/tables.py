"""Looking at solver tables and moving them between formats: what `epd-ray tables` does."""

import os
from itertools import pairwise
from pathlib import Path

from rich.console import Group
from rich.table import Table

from epd_ray.errors import TableError
from epd_ray.runs.presets import as_text
from epd_ray.solvers import Solver
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
    facts.add_row("form", as_text(solver.form))
    if solver.afs:
        facts.add_row("first step", "analytical")
    if solver.order > 1:
        facts.add_row("slope", f"multistep, order {solver.order}")
    for key, value in solver.meta.items():
        facts.add_row(key, as_text(value))
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


def _intervals(solver: Solver) -> Table:
    table = solver.table
    columns = table.columns()
    found = Table("interval", "sigma", *(COLUMN_NAMES[name] for name in columns))
    for i, (a, b) in enumerate(pairwise(solver.sigmas.tolist())):
        values = (" ".join(f"{v:.4f}" for v in rows[i].tolist()) for rows in columns.values())
        found.add_row(str(i + 1), f"{a:.5g} to {b:.5g}", *values)
    return found
