"""`epd-ray tables`: the solver tables of the package, of the reference implementation, and of the user."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epd_ray.cli.common import ending, local_path
from epd_ray.cli.options import Commands

if TYPE_CHECKING:
    from rich.console import RenderableType

app = Commands(help="List, show, import and convert solver tables.")

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOLVER",
        help="A preset, a solver directory, a *.pkl file of the reference implementation, or a hub id.",
    ),
]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The solver directory to write.", parser=local_path)]


@app.command("list")
def list_() -> None:
    """List the presets with their models and costs."""
    with ending():
        from epd_ray.runs.presets import list_presets  # reads the files without torch, which takes long to import

        _print(list_presets())


@app.command()
def show(solver: SourceArgument) -> None:
    """Print the costs, the origin and the table of a solver."""
    with ending():
        from epd_ray.runs.tables import show_solver

        _print(show_solver(solver))


@app.command("import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A *.pkl file of the reference implementation. None of its code is run."),
    ],
    out: OutOption,
) -> None:
    """Convert a solver file of the reference implementation to a solver directory."""
    with ending():
        from epd_ray.runs.tables import import_reference

        typer.echo(f"solver: {import_reference(file, out)}")


@app.command()
def convert(solver: SourceArgument, out: OutOption) -> None:
    """Write any solver to a directory that EPDScheduler.from_pretrained opens."""
    with ending():
        from epd_ray.runs.tables import convert as convert_it

        typer.echo(f"solver: {convert_it(solver, out)}")


def _print(content: "RenderableType") -> None:
    from rich.console import Console

    Console().print(content, highlight=False)
