"""`epd-ray tables ...`: solver tables that ship with the package, the reference's files, and one's own."""

from pathlib import Path
from typing import Annotated

import typer

from epd_ray.cli.common import ending, local_path

app = typer.Typer(help="Solver tables: presets, the reference's files, your own.", no_args_is_help=True)

SourceArgument = Annotated[
    str, typer.Argument(metavar="SOLVER", help="A preset, a directory, a *.pkl of the reference, or a hub id.")
]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="New solver directory.", parser=local_path)]


@app.command("list")
def list_() -> None:
    """The presets: what they are for and what they cost."""
    with ending():
        from epd_ray.runs.tables import list_presets, show

        show(list_presets())


@app.command()
def show(solver: SourceArgument) -> None:
    """Print a solver: costs, origin, and its table."""
    with ending():
        from epd_ray.runs.tables import show as print_it
        from epd_ray.runs.tables import show_solver

        print_it(show_solver(solver))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A *.pkl of the reference; nothing in it is run.")],
    out: OutOption,
) -> None:
    """Read a solver file of the reference."""
    with ending():
        from epd_ray.runs.tables import import_reference

        typer.echo(f"solver: {import_reference(file, out)}")


@app.command()
def convert(solver: SourceArgument, out: OutOption) -> None:
    """Write any solver as a directory that EPDScheduler.from_pretrained opens."""
    with ending():
        from epd_ray.runs.tables import convert as convert_it

        typer.echo(f"solver: {convert_it(solver, out)}")
