"""`epd-ray tables`: show solver tables, and write them in other formats."""

import os
from itertools import pairwise
from pathlib import Path

from rich.console import Group
from rich.table import Table

from epd_ray.deploy.export import export as export_solver
from epd_ray.deploy.formats import ExportFormat
from epd_ray.errors import TableError, shown
from epd_ray.runs.presets import as_text
from epd_ray.solvers import Solver
from epd_ray.solvers.reference import SUFFIX, read_reference
from epd_ray.solvers.solver import FILE_NAME
from epd_ray.solvers.wording import columns_as_text


def load_solver(source: str | os.PathLike[str]) -> Solver:
    """Load a solver from any source.

    Args:
        source: the name of a preset, a solver directory or its solver.json, a *.pkl file of the reference
            implementation, or a hub id.

    Returns:
        The solver, in float64.

    Raises:
        TableError: the source does not exist, or is not a solver.
    """
    return read_reference(source) if Path(source).suffix == SUFFIX else Solver.from_pretrained(source)


def show_solver(source: str | os.PathLike[str]) -> Group:
    """Describe a solver as text: its costs, its origin and its table.

    Args:
        source: see `load_solver`.

    Raises:
        TableError: see `load_solver`.
    """
    solver = load_solver(source)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("parallel NFE", f"{solver.parallel_nfe} evaluations that wait for each other")
    facts.add_row("evaluations", f"{solver.model_evals} per image")
    unknown, passes = "unknown: two an evaluation with guidance", solver.network_passes
    facts.add_row("network passes", unknown if passes is None else f"{passes} per image")
    facts.add_row("form", as_text(solver.form))
    if solver.afs:
        facts.add_row("first step", "analytical")
    if solver.order > 1:
        facts.add_row("slope", f"multistep, order {solver.order}")
    for key, value in solver.meta.items():
        facts.add_row(key, as_text(value))
    return Group(facts, "", _intervals(solver))


def import_reference(file: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Convert a *.pkl file of the reference implementation to a solver directory. None of its code is run.

    Args:
        file: the *.pkl file.
        out: the directory to write, which must be empty or must not exist yet.

    Returns:
        The path of solver.json.

    Raises:
        TableError: the file is not one of the reference implementation, or `out` is not empty.
    """
    if Path(file).suffix != SUFFIX:
        raise TableError(
            f"{shown(os.fspath(file))} is no {SUFFIX} file (use epd-ray tables convert for any other solver)"
        )
    return convert(file, out)


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write any solver to a solver directory.

    Args:
        source: see `load_solver`.
        out: the directory to write, which must be empty or must not exist yet.

    Returns:
        The path of solver.json.

    Raises:
        TableError: see `load_solver`; or `out` is not empty, is not a directory, or cannot be written.
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


def export(source: str | os.PathLike[str], to: ExportFormat, out: Path | None = None) -> list[str]:
    """Write any solver for another tool.

    Args:
        source: see `load_solver`.
        to: the format.
        out: the file, whose name a node for ComfyUI has too; None means one in the current directory that is named
            after the solver.

    Returns:
        Lines for people: the file, and what the format has no place for.

    Raises:
        TableError: see `load_solver` and `epd_ray.deploy.export.export`.
        RunDirectoryError: the file cannot be written.
    """
    path = Path(source)
    folder = path.parent if path.name == FILE_NAME else path
    if folder.name in ("", ".", "solver"):  # the directory of a run's solver, which the run's name tells from others
        folder = folder.resolve()
        folder = folder.parent if folder.name == "solver" else folder
    name = folder.name.removesuffix(SUFFIX) if out is None else out.stem
    found = export_solver(load_solver(source), name, to, out)
    return [f"{to}: {found.path}", *([] if found.lost is None else [found.lost])]


def _intervals(solver: Solver) -> Table:
    columns = columns_as_text(solver.table)
    found = Table("interval", "sigma", *columns)
    for i, (a, b) in enumerate(pairwise(solver.sigmas.tolist())):
        found.add_row(str(i + 1), f"{a:.5g} to {b:.5g}", *(rows[i] for rows in columns.values()))
    return found
