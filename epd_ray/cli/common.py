"""What the commands share: common arguments, error messages and exit codes. It imports no heavy module."""

import errno
import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epd_ray.errors import ClusterError, EpdRayError, ModelError, PlacementError, RewardError, TaskError

if TYPE_CHECKING:
    from epd_ray.config.run_config import RunConfig
    from epd_ray.telemetry.progress import Observer

USER_ERROR, INTERRUPTED = 2, 130
EXIT_CODES = {ModelError: 3, PlacementError: 4, ClusterError: 4, TaskError: 4, RewardError: 5}
"""The exit codes of errors that a scheduler of jobs may treat differently; every other error of the user is 2."""


@dataclass
class Shown:
    """What the command line prints beside its results.

    Attributes:
        tracebacks: whether to print the traceback of an error too (`--debug`).
    """

    tracebacks: bool = False


SHOWN = Shown()
"""The settings of this process; each command sets them."""

FULL, REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, {errno.EACCES, errno.EROFS, errno.EPERM}

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run directory that `epd-ray train` wrote, or its URI, such as s3://bucket/run."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A YAML file that holds the configuration.",
        show_default="the default configuration",
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes of the configuration, such as rdpo.lr=1e-3. `epd-ray config` lists the keys.",
    ),
]


def load_checked(config: Path | None, overrides: Sequence[str]) -> "RunConfig":
    """Read a configuration, and check its models before the imports that take seconds.

    Raises:
        ConfigError: see `load_config`.
        EpdRayError: see `require_models`.
    """
    from epd_ray.config.loading import load_config

    return checked(load_config(config, overrides))


def checked(settings: "RunConfig") -> "RunConfig":
    """Check the models and reward servers of a configuration, and return it.

    Raises:
        EpdRayError: see `require_models`.
    """
    from epd_ray.actors.beforehand import require_models

    require_models(settings)
    return settings


def place(run: str) -> str | Path:
    """The place of a run as a path, or as the URI itself, because a Path would drop one of its slashes."""
    return run if "://" in run else Path(run)


def local_path(text: str | Path) -> Path:
    """Parse an option that names a local path. A URI is refused: its Path would be a local folder s3:/b/x."""
    if "://" in str(text):
        raise typer.BadParameter(
            f"{text} is a URI, but only run directories can be remote: give a path on this machine"
        )
    return Path(text)


@contextmanager
def ending(run: str | Path | None = None) -> Iterator[None]:
    """Turn the user's errors and Ctrl-C into one line and an exit code.

    Args:
        run: the run that can be resumed after Ctrl-C, as a path or URI; None where there is none.
    """
    try:
        yield
    except EpdRayError as error:
        show_traceback()
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(exit_code(error)) from None
    except OSError as error:
        if error.errno not in FULL | REFUSED:
            raise
        show_traceback()
        where, fix = (
            error.filename or "the disk",
            "free some space" if error.errno in FULL else "change its permissions",
        )
        typer.echo(f"error: {where}: {error.strerror} ({fix}, or use another place)", err=True)
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        begun = isinstance(run, str) or (run is not None and (run / "config.yaml").is_file())
        hint = f"; continue with: epd-ray train --resume {shlex.quote(str(run))}" if begun else ""
        typer.echo(f"stopped{hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def exit_code(error: EpdRayError) -> int:
    """The exit code of a command that ends with this error."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), USER_ERROR)


def show_traceback() -> None:
    """Print the traceback of the error that is being handled, if --debug was given."""
    if SHOWN.tracebacks:
        typer.echo(traceback.format_exc(), err=True)


@contextmanager
def observed() -> Iterator["Observer"]:
    """An observer of the console, which ends its display also after an error."""
    from epd_ray.telemetry.progress import console_observer

    observer = console_observer()
    try:
        yield observer
    finally:
        observer.done()


def say(lines: Sequence[str]) -> None:
    """Print lines."""
    for line in lines:
        typer.echo(line)
