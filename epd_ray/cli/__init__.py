"""The `epd-ray` command. What is heavy is imported inside the commands, so that --help answers at once."""

import os
import sys
from typing import Annotated

import typer

from epd_ray.cli import ab, evaluate, rewards, runs, score, sweep, tables
from epd_ray.cli.common import SHOWN

app = typer.Typer(
    epilog="Start with `epd-ray train`: no arguments, no GPU, no download.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    runs.train,
    runs.distill,
    runs.sample,
    evaluate.evaluate,
    runs.report,
    runs.results,
    runs.fetch,
    runs.doctor,
    runs.bench,
):
    app.command()(command)
app.command()(score.score)
app.command()(sweep.sweep)
app.add_typer(ab.app, name="ab")
app.add_typer(tables.app, name="tables")
app.add_typer(rewards.app, name="rewards")


@app.callback()
def common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback behind a one-line error. It may stand anywhere.")
    ] = False,
) -> None:
    """Fine-tune the ODE solver of a frozen diffusion model with reinforcement learning, on Ray."""
    SHOWN.tracebacks = debug


def main(*command: str) -> None:
    """The console script; jobs/*.py are its commands, one each.

    Args:
        command: what stands before the arguments of this process, such as "train".
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of a torchvision that nothing here needs
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else notices break the progress display
    sys.argv[1:1] = command  # so that results can say how they were made
    if "--debug" in sys.argv[1:]:  # an option of every command: people add it at the end of the line that failed
        sys.argv.remove("--debug")
        sys.argv.insert(1, "--debug")
    app(prog_name="epd-ray")
