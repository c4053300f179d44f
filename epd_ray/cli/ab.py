"""`epd-ray ab ...`: which of two solvers' pictures people prefer."""

from pathlib import Path
from typing import Annotated

import typer

from epd_ray.cli.common import ending, local_path, say

app = typer.Typer(help="Blind side-by-side comparison by people.", no_args_is_help=True)

PageArgument = Annotated[Path, typer.Argument(metavar="PAGE", help="A folder that `epd-ray ab make` wrote.")]


@app.command()
def make(
    left: Annotated[Path, typer.Argument(metavar="LEFT", help="Pictures, such as RUN/images/samples/rdpo.")],
    right: Annotated[Path, typer.Argument(metavar="RIGHT", help="Another solver's, with the same file names.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder.", parser=local_path)],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="As for epd-ray score, or a .json list.", show_default="those beside them"),
    ] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="The first so many.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of sides and order.")] = 0,
) -> None:
    """Write a page that shows two folders of pictures side by side, blind."""
    with ending():
        from epd_ray.evaluation.ab.make import make_page

        say(make_page(left, right, out, prompts, pairs, seed))


@app.command()
def serve(
    page: PageArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On loopback; 0: any that is free.")] = 8010,
) -> None:
    """Show a page, and save its votes beside it."""
    with ending():
        from epd_ray.evaluation.ab.server import serve_page

        serve_page(page, port, typer.echo)


@app.command()
def results(
    page: PageArgument,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RESULTS", help="Downloaded from the page, one per rater.", show_default="PAGE's own"),
    ] = None,
) -> None:
    """Un-blind a page's votes: wins, ties and losses with a 95 % interval."""
    with ending():
        from epd_ray.evaluation.ab.tally import results as unblind

        say(unblind(page, files or []))
