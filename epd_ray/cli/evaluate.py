"""`epd-ray evaluate`: the solver of a run on other prompts, or a suite of solvers on any model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from epd_ray.cli.common import INTERRUPTED, ConfigOption, checked, ending, local_path, observed, place, say
from epd_ray.cli.options import taking
from epd_ray.errors import ConfigError, shown

if TYPE_CHECKING:
    from epd_ray.config.run_config import RunConfig
    from epd_ray.evaluation.suites.settings import Request


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `epd-ray evaluate`. A run takes `count`, `prompts` and `split`; the others need `suite`."""

    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [KEY=VALUE]...",
            help="Without --suite, the directory or URI of a run. With --suite, settings such as "
            "backbone.guidance_scale=4; the suite `prompts` also takes the file of its prompts here.",
        ),
    ] = None
    suite: Annotated[
        Literal["paper", "paper-fid", "embedded", "prompts"] | None,
        typer.Option(
            help="The solvers to compare on a model. paper: the solvers of the papers' tables. paper-fid: the solvers "
            "of the papers' FID table. embedded and prompts: a learned solver, and every baseline at the same cost."
        ),
    ] = None
    solver: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOLVER", help="A learned solver: RUN/solver, a preset, or a hub id. Repeat the option for several."
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The model, as the setting backbone.model=MODEL names it.", show_default="the setting"
        ),
    ] = None
    config: ConfigOption = None
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The directory of the results of a suite. An interrupted suite continues there.",
            parser=local_path,
        ),
    ] = None
    table: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The name of the papers' table to compare with.",
            show_default="the table of the model's family and resolution",
        ),
    ] = None
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="The number of held-out prompts, or of pictures where the model takes no prompts.",
            show_default="all prompts, or the number of the suite",
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A file with one prompt a line.", show_default="the prompts of the run or the suite"
        ),
    ] = None
    images_per_prompt: Annotated[
        int, typer.Option(min=1, metavar="N", help="The pictures per prompt. The diversity metric needs at least 2.")
    ] = 1
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The network whose features diversity and the Frechet distance compare: inception or a CLIP model.",
            show_default="inception for the suite paper-fid",
        ),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Pictures, or an .npz file of their statistics, from which the Frechet distance is measured.",
            show_default="no Frechet distance",
        ),
    ] = None
    split: Annotated[
        Literal["validation", "test"] | None,
        typer.Option(help="The held-out prompts of a run that are used.", show_default="test"),
    ] = None


@taking(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Compare the solver of a run with the baselines on held-out prompts, or a suite of solvers on any model."""
    with ending():
        if options.suite is None:
            _run_again(options)
        else:
            _measure(*_suite_of(options), options.config)


def _run_again(options: EvaluateOptions) -> None:
    """Compare the solver of a run with the baselines again, on other prompts than at the end of the run."""
    given = options.arguments or []
    of_suites = (options.solver, options.model, options.config, options.out, options.table)
    if len(given) != 1 or any((*of_suites, options.features, options.reference)) or options.images_per_prompt > 1:
        raise ConfigError(
            [
                "give one RUN, which takes --count, --prompts and --split; everything else needs --suite "
                "(epd-ray evaluate --help)"
            ]
        )
    from epd_ray.runs import evaluate as run

    with observed() as observer:
        headline = run.evaluate(place(given[0]), options.count, options.prompts, options.split or "test", observer)
    say(headline)


def _suite_of(options: EvaluateOptions) -> tuple["Request", list[str]]:
    """The request of a suite, and the settings on the command line."""
    from epd_ray.evaluation.suites.settings import Request

    suite, given = options.suite, options.arguments or []
    assert suite is not None
    settings = [*([f"backbone.model={options.model}"] if options.model else []), *(t for t in given if "=" in t)]
    files = [text for text in given if "=" not in text]
    if len(files) > (suite == "prompts" and options.prompts is None):
        raise ConfigError([f"{shown(files[-1])}: with --suite {suite} expected KEY=VALUE, such as backbone.model=..."])
    if options.split is not None:
        raise ConfigError(["--split is for the prompts of a RUN: leave it out with --suite"])
    if options.out is None:
        raise ConfigError([f"--suite {suite} needs --out DIR for its results: an interrupted suite continues there"])
    request = Request(
        suite=suite,
        out=options.out,
        solvers=tuple(options.solver or ()),
        table=options.table,
        count=options.count,
        prompts=Path(files[0]) if files else options.prompts,
        images_per_prompt=options.images_per_prompt,
        features=options.features,
        reference=options.reference,
    )
    return request, settings


def _measure(request: "Request", given: list[str], config: Path | None) -> None:
    from epd_ray.evaluation.suites.settings import load_settings

    settings: RunConfig = checked(load_settings(request.suite, config, given))
    from epd_ray.evaluation.suites.evaluate import evaluate_suite

    try:
        with observed() as observer:
            lines = evaluate_suite(settings, request, observer)
    except KeyboardInterrupt:
        typer.echo(f"stopped: what was scored is in {request.out}; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    say(lines)
