"""The `epd-ray` command. Each command imports its heavy modules when it runs, so that --help answers at once."""

import os
import sys
from typing import Annotated

import typer

from epd_ray.cli import ab, evaluate, rewards, runs, score, settings, sweep, tables
from epd_ray.cli.common import SHOWN
from epd_ray.cli.options import Commands

app = Commands(
    epilog="Start with `epd-ray train`, which needs no arguments, no GPU and no download. Exit codes: 0 done, 2 a "
    "setting or a file is wrong, 3 a model, 4 the cluster (no room, lost, or a task failed), 5 a reward head, "
    "130 interrupted."
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
app.command()(settings.config)
app.add_typer(ab.app, name="ab")
app.add_typer(tables.app, name="tables")
app.add_typer(rewards.app, name="rewards")


@app.callback()
def common(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Show the traceback of an error beside its one-line message. The flag may stand anywhere."
        ),
    ] = False,
) -> None:
    """Fine-tune the ODE solver of a frozen diffusion model with reinforcement learning, on Ray."""
    SHOWN.tracebacks = debug


def main(*command: str) -> None:
    """Run the console script. Each file in jobs/ calls it for one command.

    Args:
        command: the words that go before the arguments of this process, such as "train".
    """
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # otherwise it warns that torchvision is missing, which is not needed
    os.environ.setdefault("TQDM_DISABLE", "1")  # otherwise diffusers and transformers show bars while they load files
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # otherwise notices of Ray break the progress display
    sys.argv[1:1] = command  # results name the command that made them
    if "--debug" in sys.argv[1:]:  # users add it at the end of the command that failed
        sys.argv.remove("--debug")
        sys.argv.insert(1, "--debug")
    app(prog_name="epd-ray")
