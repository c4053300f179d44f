"""`epd-ray evaluate`: a run's solver again, or a suite on any model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from epd_ray.cli.common import INTERRUPTED, ConfigOption, ending, local_path, observed, place, say
from epd_ray.errors import ConfigError

if TYPE_CHECKING:
    from epd_ray.evaluation.suites.settings import Request


def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [KEY=VALUE]...",
            help="A run directory or URI; with --suite configuration changes, and for prompts the FILE.",
        ),
    ] = None,
    suite: Annotated[
        Literal["paper", "paper-fid", "embedded", "prompts"] | None,
        typer.Option(help="Compare samplers on a model: the paper's tables, its FID table, or all rivals of a solver."),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(metavar="SOLVER", help="RUN/solver, a preset or a hub id; give it again for more."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="The same as backbone.model=MODEL.")] = None,
    config: ConfigOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where a suite's results go; what is there is kept.", parser=local_path),
    ] = None,
    table: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the paper.", show_default="by the model's family and size")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Held-out prompts, or pictures without prompts.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts, one a line.", show_default="the run's or the suite's own"),
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, metavar="N", help="For diversity: at least 2.")] = 1,
    features: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What diversity and Frechet distance see: inception, or a CLIP model."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Pictures, or .npz statistics, that the Frechet distance is taken to."),
    ] = None,
    split: Annotated[
        Literal["validation", "test"] | None,
        typer.Option(help="Which of a RUN's held-out prompts.", show_default="test"),
    ] = None,
) -> None:
    """Compare a run's solver with the baselines on held-out prompts, or measure a suite on any model."""
    given = arguments or []
    with ending():
        if suite is None:
            if (
                len(given) != 1
                or any((solver, model, config, out, table, features, reference))
                or images_per_prompt > 1
            ):
                raise ConfigError(
                    ["give one RUN, with --count, --prompts and --split alone; or --suite for everything else "
                     "(epd-ray evaluate --help)"]
                )  # fmt: skip
            from epd_ray.runs import train as run

            with observed() as observer:
                headline = run.evaluate(place(given[0]), count, prompts, split or "test", observer)
            say(headline)
            return
        overrides = [*([f"backbone.model={model}"] if model else []), *(text for text in given if "=" in text)]
        files = [text for text in given if "=" not in text]
        if len(files) > (suite == "prompts" and prompts is None):
            raise ConfigError([f"{files[-1]!r}: with --suite {suite} expected KEY=VALUE, such as backbone.model=..."])
        if split is not None:
            raise ConfigError(["--split is of a RUN's prompts: leave it out with --suite"])
        if out is None:
            raise ConfigError(
                [f"--suite {suite} needs --out DIR: the results go there, and an interrupted one goes on"]
            )
        from epd_ray.evaluation.suites.settings import Request

        request = Request(
            suite, out, tuple(solver or ()), table, count, Path(files[0]) if files else prompts, images_per_prompt,
            features, reference,
        )  # fmt: skip
        _measure(request, config, overrides)


def _measure(request: "Request", config: Path | None, overrides: list[str]) -> None:
    from epd_ray.evaluation.suites.evaluate import evaluate_suite
    from epd_ray.evaluation.suites.settings import load_settings

    settings = load_settings(request.suite, config, overrides)
    try:
        with observed() as observer:
            lines = evaluate_suite(settings, request, observer)
    except KeyboardInterrupt:
        typer.echo(f"stopped: what was scored is in {request.out}; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    say(lines)
