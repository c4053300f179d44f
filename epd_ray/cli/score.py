"""`epd-ray score`: the rewards of pictures that exist already."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epd_ray.cli.common import INTERRUPTED, ConfigOption, OverridesArgument, ending, local_path, observed, say
from epd_ray.cli.options import taking
from epd_ray.errors import ConfigError, UnknownNameError, shown

if TYPE_CHECKING:
    from epd_ray.config.run_config import RunConfig


@dataclass(frozen=True)
class ScoreCommand:
    """The arguments of `epd-ray score`."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A folder of pictures, a .tar or .parquet file, or a pattern of such files."
        ),
    ]
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="The directory of the scores. Pictures that have scores there are not scored again.",
            parser=local_path,
        ),
    ]
    overrides: OverridesArgument = None
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="The reward heads, separated by commas, such as clip,hpsv2.1 (see epd-ray rewards list).",
        ),
    ] = None
    config: ConfigOption = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The prompts of a folder of pictures: a table of file names and prompts, or one prompt a line.",
            show_default="the file x.txt beside x.png",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="The number of pictures in one call of a head.")] = 32
    max_errors: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="The share of the pictures that may fail, from 0 to 1, before the command fails."
        ),
    ] = 0.01
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The address of the Ray cluster to use.",
            show_default="Ray is started on this machine",
        ),
    ] = None


@taking(ScoreCommand)
def score(command: ScoreCommand) -> None:
    """Score pictures in a folder, in .tar or in .parquet files. A second call scores what is missing or failed."""
    with ending():
        c = command
        settings = _settings(c.heads, c.config, list(c.overrides or []), c.address)
        from epd_ray.score.pipeline import ScoreRequest
        from epd_ray.score.pipeline import score as score_all

        request = ScoreRequest(c.source, c.out, c.prompts, c.batch_size, c.max_errors)
        try:
            with observed() as observer:
                lines = score_all(request, settings, observer)
        except KeyboardInterrupt:
            typer.echo(f"stopped: what was scored is in {c.out}; the same command scores the rest", err=True)
            raise typer.Exit(INTERRUPTED) from None
        say(lines)


def _settings(heads: str | None, config: Path | None, overrides: list[str], address: str | None) -> "RunConfig":
    """The configuration with the named heads, which come from the registry or from the configuration file.

    Raises:
        ConfigError: no head is named, or a setting is wrong.
        UnknownNameError: a named head does not exist.
    """
    from epd_ray.config.loading import load_config
    from epd_ray.registry import did_you_mean
    from epd_ray.rewards import HEADS

    known = {_short(name): name for name in HEADS.names()}
    asked = [name.strip() for name in (heads or "").split(",") if name.strip()]
    names = list(dict.fromkeys(_short(name) if name in known.values() else name for name in asked))
    if config is None:
        if unknown := [name for name in names if name not in known]:
            raise UnknownNameError(f"unknown reward head {shown(unknown[0])}{did_you_mean(unknown[0], HEADS.names())}")
        if not names and not overrides:
            raise ConfigError(["no heads: give --heads, such as --heads clip, or --config FILE"])
        section = ", ".join(f"{name}: {{head: {known[name]}}}" for name in names)
        overrides = [f"rewards={{{section}}}", *overrides]
    if address is not None:
        overrides = [*overrides, f"cluster.address={address}"]
    settings = load_config(config, overrides)
    if absent := [name for name in names if name not in settings.rewards]:
        raise UnknownNameError(
            f"no head {shown(absent[0])} in the configuration{did_you_mean(absent[0], settings.rewards)}"
        )
    return settings.model_copy(update={"rewards": {name: settings.rewards[name] for name in names or settings.rewards}})


def _short(name: str) -> str:
    """The name of a head without its version: hpsv2 for hpsv2.1, because names in configurations have no dot."""
    return name.partition(".")[0]
