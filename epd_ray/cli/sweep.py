"""`epd-ray sweep`: many runs with different values of some keys of the configuration."""

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from epd_ray.cli.common import INTERRUPTED, ConfigOption, OverridesArgument, checked, ending, local_path, observed, say
from epd_ray.errors import ConfigError


def sweep(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The directory to write.", show_default="sweeps/<time>-<name>", parser=local_path
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory of a sweep to continue.", parser=local_path)
    ] = None,
) -> None:
    """Try values of some keys of the configuration with Ray Tune, and keep the solver with the best held-out reward."""
    with ending():
        if resume and (config or out or overrides):
            raise ConfigError(["--resume continues with the configuration of the sweep: leave out everything else"])
        if resume is None:
            from epd_ray.sweep.space import load_plan

            plan = load_plan(config, overrides or [])
            checked(plan.config)
            path = out or Path("sweeps", f"{time.strftime('%Y%m%d-%H%M%S')}-{plan.config.name}")
        else:
            path = resume
        from epd_ray.sweep import tuner as runner

        try:
            with observed() as observer:
                lines = runner.resume(path, observer) if resume else runner.sweep(plan, path, observer)
        except KeyboardInterrupt:
            begun = (path / runner.PLAN_FILE).is_file()
            hint = f"; continue with: epd-ray sweep --resume {shlex.quote(str(path))}" if begun else ""
            typer.echo(f"stopped{hint}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        say(lines)
