"""The `epd-ray` command. What is heavy is imported inside the commands, so that --help answers at once."""

import os
import sys

import typer

from epd_ray.cli import ab, evaluate, rewards, runs, score, sweep, tables

app = typer.Typer(
    help="Fine-tune the ODE solver of a frozen diffusion model with reinforcement learning, on Ray.",
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


def main(*command: str) -> None:
    """The console script; jobs/*.py are its commands, one each.

    Args:
        command: what stands before the arguments of this process, such as "train".
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of a torchvision that nothing here needs
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else notices break the progress display
    sys.argv[1:1] = command  # so that results can say how they were made
    app(prog_name="epd-ray")
