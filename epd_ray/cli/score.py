"""`epd-ray score`: rewards of pictures that are there already."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epd_ray.cli.common import INTERRUPTED, ConfigOption, OverridesArgument, ending, local_path, observed, say
from epd_ray.cli.options import taking
from epd_ray.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from epd_ray.config.run_config import RunConfig


@dataclass(frozen=True)
class ScoreCommand:
    """What `epd-ray score` is asked for."""

    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder of pictures, .tar or .parquet files, or a pattern of them."),
    ]
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="The directory of the scores. What is there already is kept.", parser=local_path
        ),
    ]
    overrides: OverridesArgument = None
    heads: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Reward heads, such as clip,hpsv2 (see epd-ray rewards list)."),
    ] = None
    config: ConfigOption = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The prompts of a folder: a table of file names and prompts, or one prompt a line.",
            show_default="x.txt beside x.png",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one call of a head.")] = 32
    max_errors: Annotated[
        float, typer.Option(min=0, max=1, help="The share of all rows that may fail before the command does.")
    ] = 0.01
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster.", show_default="a Ray of the command's own")
    ] = None


@taking(ScoreCommand)
def score(command: ScoreCommand) -> None:
    """Score the pictures of a folder, of tars or of Parquet files. Run it again to score what is missing or failed."""
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
    """The configuration with the heads that were named: of the registry, or of the file.

    Raises:
        ConfigError: no heads, or wrong settings.
        UnknownNameError: a head that is not there.
    """
    from epd_ray.config.loading import load_config
    from epd_ray.registry import did_you_mean
    from epd_ray.rewards import HEADS

    known = {_short(name): name for name in HEADS.names()}
    asked = [name.strip() for name in (heads or "").split(",") if name.strip()]
    names = list(dict.fromkeys(_short(name) if name in known.values() else name for name in asked))
    if config is None:
        if unknown := [name for name in names if name not in known]:
            raise UnknownNameError(f"unknown reward head {unknown[0]!r}{did_you_mean(unknown[0], HEADS.names())}")
        if not names and not overrides:
            raise ConfigError(["no heads: give --heads, such as --heads clip, or --config FILE"])
        section = ", ".join(f"{name}: {{head: {known[name]}}}" for name in names)
        overrides = [f"rewards={{{section}}}", *overrides]
    if address is not None:
        overrides = [*overrides, f"cluster.address={address}"]
    settings = load_config(config, overrides)
    if absent := [name for name in names if name not in settings.rewards]:
        raise UnknownNameError(f"no head {absent[0]!r} in the configuration{did_you_mean(absent[0], settings.rewards)}")
    return settings.model_copy(update={"rewards": {name: settings.rewards[name] for name in names or settings.rewards}})


def _short(name: str) -> str:
    """hpsv2 for hpsv2.1: a head's name in configurations and columns has no dot."""
    return name.partition(".")[0]
