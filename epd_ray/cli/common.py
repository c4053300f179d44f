"""What the commands share: how they end, what they show. Nothing heavy is imported before a command runs."""

import errno
import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epd_ray.errors import EpdRayError

if TYPE_CHECKING:
    from epd_ray.telemetry.progress import Observer

USER_ERROR, INTERRUPTED = 2, 130


@dataclass
class Shown:
    """What the command line prints beside its results.

    Attributes:
        tracebacks: whether the traceback behind a one-line error is printed too (`--debug`).
    """

    tracebacks: bool = False


SHOWN = Shown()
"""Of this process; set anew by each command."""

FULL, REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, {errno.EACCES, errno.EROFS, errno.EPERM}

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory, as `train` leaves it, or a URI: s3://bucket/run.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML configuration.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Configuration changes, such as rdpo.lr=1e-3.")
]


def place(run: str) -> str | Path:
    """Where a run lies; a URI stays as it is, since a Path would lose one of its slashes."""
    return run if "://" in run else Path(run)


def local_path(text: str | Path) -> Path:
    """Parses an option that is written to a local disk alone; a Path of s3://b/x would be a local folder s3:/b/x."""
    if "://" in str(text):
        raise typer.BadParameter(f"{text} is a URI, and only runs can lie elsewhere: name a path of this machine")
    return Path(text)


@contextmanager
def ending(run: str | Path | None = None) -> Iterator[None]:
    """Turn the user's errors and Ctrl-C into clean lines and an exit code; `run` is what could be resumed."""
    try:
        yield
    except EpdRayError as error:
        show_traceback()
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(USER_ERROR) from None
    except OSError as error:
        if error.errno not in FULL | REFUSED:
            raise
        show_traceback()
        where, fix = error.filename or "the disk", "make room" if error.errno in FULL else "see to its permissions"
        typer.echo(f"error: {where}: {error.strerror} ({fix}, or use another place)", err=True)
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        begun = isinstance(run, str) or (run is not None and (run / "config.yaml").is_file())
        hint = f"; continue with: epd-ray train --resume {shlex.quote(str(run))}" if begun else ""
        typer.echo(f"stopped{hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def show_traceback() -> None:
    """Print the traceback of the error that is being handled, where --debug asks for it."""
    if SHOWN.tracebacks:
        typer.echo(traceback.format_exc(), err=True)


@contextmanager
def observed() -> Iterator["Observer"]:
    """An observer that lets go of the terminal whatever happens."""
    from epd_ray.telemetry.progress import console_observer

    observer = console_observer()
    try:
        yield observer
    finally:
        observer.done()


def say(lines: Sequence[str]) -> None:
    """One line each."""
    for line in lines:
        typer.echo(line)
