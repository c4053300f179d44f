"""The `epd-ray` command. What is heavy is imported inside the commands, so that --help answers at once."""

import errno
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from epd_ray.errors import ConfigError, EpdRayError

if TYPE_CHECKING:
    from epd_ray.progress import Observer

USER_ERROR, INTERRUPTED = 2, 130
DISK_PROBLEMS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}

app = typer.Typer(
    help="Fine-tune the ODE solver of a frozen diffusion model with reinforcement learning, on Ray.",
    epilog="Start with `epd-ray train`: no arguments, no GPU, no download.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as `train` leaves it.")]


def main() -> None:
    """The console script."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of a torchvision that nothing here needs
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else notices break the progress display
    app()


@contextmanager
def _ending(run: Path | None = None) -> Iterator[None]:
    """Turn the user's errors and Ctrl-C into clean lines and an exit code; `run` is what could be resumed."""
    try:
        yield
    except EpdRayError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(USER_ERROR) from None
    except OSError as error:
        if error.errno not in DISK_PROBLEMS:
            raise
        where = error.filename or "the disk"
        typer.echo(f"error: {where}: {error.strerror} (make room, or choose another --out)", err=True)
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        begun = run is not None and (run / "config.yaml").is_file()
        hint = f"; continue with: epd-ray train --resume {shlex.quote(str(run))}" if begun else ""
        typer.echo(f"stopped{hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _observed() -> Iterator["Observer"]:
    """An observer that lets go of the terminal whatever happens."""
    from epd_ray.progress import console_observer

    observer = console_observer()
    try:
        yield observer
    finally:
        observer.done()


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(line)


@app.command()
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Configuration changes, such as rdpo.lr=1e-3.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML configuration.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New run directory.", show_default="runs/<time>-<name>")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this run from its checkpoint.")] = None,
) -> None:
    """Fine-tune a solver, compare it with the baselines, and write a report."""
    with _ending():
        if resume and (config or out or overrides):
            raise ConfigError(["--resume continues with the run's own configuration: leave out everything else"])
        if resume is None:
            from epd_ray.config import load_config

            settings = load_config(config, overrides or [])
            path = out or Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.name}")
        else:
            path = resume
    with _ending(path):
        from epd_ray import run

        if resume is None:
            _say(run.describe(settings))
        with _observed() as observer:
            headline = run.resume(path, observer) if resume else run.train(settings, path, observer)
        _say([*headline, f"report: {path / 'report.html'}", f"solver: {path / 'solver'}"])


@app.command()
def sample(
    solver: Annotated[str, typer.Option(metavar="DIR", help="A solver directory, such as RUN/solver, or a hub id.")],
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What to draw; give it again for more pictures.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the picture goes.")] = Path("sample.png"),
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Directory, hub id or embedded name.", show_default="the solver's own"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (cuda, mps, cpu), or a torch device.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Draw prompts with a learned solver."""
    with _ending():
        from epd_ray import run

        run.sample(solver, prompt, seed, out, model, device, dtype)
        typer.echo(f"picture: {out}")


@app.command()
def evaluate(
    path: RunArgument,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Held-out prompts.", show_default="the run's own")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts, one a line.", show_default="the run's own split"),
    ] = None,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Which of the run's held-out prompts.")] = "test",
) -> None:
    """Compare a run's solver with the baselines on held-out prompts."""
    with _ending():
        from epd_ray import run

        with _observed() as observer:
            headline = run.evaluate(path, count, prompts, split, observer)
        _say(headline)


@app.command()
def report(path: RunArgument) -> None:
    """Write a run's report.html again."""
    with _ending():
        from epd_ray.report import write_report

        typer.echo(f"report: {write_report(path)}")


@app.command()
def doctor() -> None:
    """Say what is installed, which device is used, and what is missing."""
    with _ending():
        from epd_ray.doctor import examine, show

        if not show(examine()):
            raise typer.Exit(1)


@app.command()
def bench(
    cases: Annotated[list[str] | None, typer.Argument(metavar="CASE", help="overhead, overlap, reference.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the records there, as JSON.")] = None,
) -> None:
    """Measure this system against something in the same run."""
    with _ending():
        import json

        from epd_ray.bench import CASES
        from epd_ray.registry import did_you_mean

        unknown = [case for case in cases or [] if case not in CASES]
        if unknown:
            raise ConfigError([f"unknown case {case!r}{did_you_mean(case, CASES)}" for case in unknown])
        records = {}
        for case in cases or CASES:
            records[case] = CASES[case]()
            typer.echo(f"{case}: {json.dumps(records[case])}")
        if out is not None:
            out.write_text(json.dumps(records, indent=2))


if __name__ == "__main__":
    main()
