"""`epd-ray ab`: a blind test in which people compare the pictures of two solvers."""

from pathlib import Path
from typing import Annotated

import typer

from epd_ray.cli.common import ending, local_path, say
from epd_ray.cli.options import Commands

app = Commands(help="Let people compare the pictures of two solvers side by side, blind.")

PageArgument = Annotated[Path, typer.Argument(metavar="PAGE", help="The folder that `epd-ray ab make` wrote.")]


@app.command()
def make(
    left: Annotated[
        Path, typer.Argument(metavar="LEFT", help="A folder of pictures, such as RUN/images/samples/rdpo.")
    ],
    right: Annotated[
        Path,
        typer.Argument(
            metavar="RIGHT", help="A folder with the pictures of another solver, under the same file names."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.", parser=local_path)],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The prompts of the pictures: a table of file names and prompts, one prompt a line, or a .json list.",
            show_default="the prompt files beside the pictures",
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(min=1, help="The number of pairs, from the first file name on.", show_default="all pairs"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="The seed that decides the sides and the order of the pairs.")
    ] = 0,
) -> None:
    """Write a web page that shows the pictures of two folders side by side without their names."""
    with ending():
        from epd_ray.evaluation.ab.make import make_page

        say(make_page(left, right, out, prompts, pairs, seed))


@app.command()
def serve(
    page: PageArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port on 127.0.0.1. 0 takes any free port.")] = 8010,
) -> None:
    """Serve the page to browsers on this machine, and save the votes beside it."""
    with ending():
        from epd_ray.evaluation.ab.server import serve_page

        serve_page(page, port, typer.echo)


@app.command()
def results(
    page: PageArgument,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RESULTS",
            help="Files of votes that raters downloaded from the page.",
            show_default="the votes beside the page",
        ),
    ] = None,
) -> None:
    """Count the wins, ties and losses of the votes, with a 95 % confidence interval."""
    with ending():
        from epd_ray.evaluation.ab.tally import results as unblind

        say(unblind(page, files or []))
