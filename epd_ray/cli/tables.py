"""`epd-ray tables`: the solver tables of the package, of the reference implementation, and of the user."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epd_ray.cli.common import ending, local_path, say
from epd_ray.cli.options import Commands
from epd_ray.deploy.formats import ExportFormat

if TYPE_CHECKING:
    from rich.console import RenderableType

app = Commands(help="List, show, import, convert and export solver tables.")

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


@app.command()
def export(
    solver: SourceArgument,
    to: Annotated[
        ExportFormat,
        typer.Option(
            help="sigmas: the noise levels alone, as text. diffusers: those for its own schedulers. json, numpy: the "
            "whole solver as plain values. comfyui: a custom node that runs the whole solver."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The file to write, which must not exist yet.",
            show_default="named after the solver",
            parser=local_path,
        ),
    ] = None,
) -> None:
    """Write a solver for another tool: ComfyUI, diffusers' own schedulers, JSON or NumPy."""
    with ending():
        from epd_ray.runs.tables import export as export_it

        say(export_it(solver, to, out))


def _print(content: "RenderableType") -> None:
    from rich.console import Console

    Console().print(content, highlight=False)
