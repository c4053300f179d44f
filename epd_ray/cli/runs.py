"""Commands on runs and solvers, and those that look at the machine."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from epd_ray.cli.common import (
    ConfigOption,
    OverridesArgument,
    RunArgument,
    ending,
    local_path,
    observed,
    place,
    say,
)
from epd_ray.cli.options import taking
from epd_ray.errors import ConfigError


def train(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="New run directory, or s3://bucket/run.", show_default="runs/<time>-<name>"),
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this run from its checkpoint.")] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Continue the run where --out holds it already: for schedulers.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Place the actors, measure one batch, and say what the run would take.")
    ] = False,
) -> None:
    """Fine-tune a solver, compare it with the baselines, and write a report."""
    with ending():
        if resume is not None and (config or out or overrides or dry_run or retry):
            raise ConfigError(["--resume continues with the run's own configuration: leave out everything else"])
        if retry and (out is None or dry_run):
            raise ConfigError(["--retry continues the run in --out: give --out, and no --dry-run"])
        if resume is None:
            from epd_ray.config.loading import load_config

            settings = load_config(config, overrides or [])
            if dry_run:
                from epd_ray.runs.dry_run import dry_run as measure

                with observed() as observer:
                    lines = measure(settings, observer)
                say(lines)
                return
            path = place(out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{settings.name}")
        else:
            path = place(resume)
    with ending(path):
        from epd_ray.runs import train as run
        from epd_ray.storage.places import inside

        if resume is None:
            say(run.describe(settings))
        with observed() as observer:
            if resume is None:
                headline = run.train(settings, path, observer, again=retry)
            else:
                headline = run.resume(path, observer)
        copy = "" if isinstance(path, Path) else " (copy it to a disk to sample with it)"
        say([*headline, f"report: {inside(path, 'report.html')}", f"solver: {inside(path, 'solver')}{copy}"])


@dataclass(frozen=True)
class SampleCommand:
    """What `epd-ray sample` is asked for."""

    solver: Annotated[
        str,
        typer.Option(metavar="SOLVER", help="RUN/solver, a preset (see epd-ray tables list), or a hub id."),
    ]
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="What to draw. Repeat the option for more.")]
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the noise of the first picture.")] = 0
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture file.", parser=local_path)] = Path("sample.png")
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A pipeline directory, a hub id, or an embedded model's name.",
            show_default="the model that the solver was made for",
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, help="Scale of classifier-free guidance.", show_default="the solver's own"),
    ] = None
    resolution: Annotated[int | None, typer.Option(min=8, help="Pixels per side.", show_default="the solver's own")] = (
        None
    )
    device: Annotated[str, typer.Option(help="auto (cuda, else mps, else cpu), or a torch device.")] = "auto"
    dtype: Annotated[str, typer.Option(help="Precision of the network: auto, float32, bfloat16 or float16.")] = "auto"
    family: Annotated[
        str | None,
        typer.Option(metavar="MODULE:CLASS", help="A backbone class of your own.", show_default="the solver's own"),
    ] = None


@taking(SampleCommand)
def sample(command: SampleCommand) -> None:
    """Draw prompts with a learned solver, side by side in one picture."""
    with ending():
        from diffusers.utils.logging import disable_progress_bar
        from transformers.utils.logging import disable_progress_bar as disable_too

        from epd_ray.runs.sample import SampleOptions
        from epd_ray.runs.sample import sample as draw

        disable_progress_bar()
        disable_too()
        c = command
        options = SampleOptions(c.model, c.guidance_scale, c.resolution, c.device, c.dtype, c.family)
        draw(c.solver, c.prompt, c.seed, c.out, options)
        typer.echo(f"picture: {c.out}")


def report(path: RunArgument) -> None:
    """Write a run's report.html again."""
    with ending():
        from epd_ray.runs.report import write_report
        from epd_ray.storage.places import inside, place_of

        with place_of(place(path)).visited() as folder:
            written = write_report(folder).relative_to(folder)
        typer.echo(f"report: {inside(place(path), written)}")


def results(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Directories of evaluate --suite, and files of bench --out."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the document goes.", parser=local_path)] = Path(
        "results"
    ),
    title: Annotated[str, typer.Option(metavar="TEXT", help="Of the document.")] = "What was measured",
) -> None:
    """Join what suites and benchmarks measured into one document, each figure under its command."""
    with ending():
        from epd_ray.evaluation.results import write_document

        say(write_document(title, sources, out))


def distill(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="New solver directory.", show_default="solvers/<time>-<name>", parser=local_path
        ),
    ] = None,
) -> None:
    """Stage 1 alone, without rewards: a solver that follows a finer one, also for unconditional models."""
    with ending():
        from epd_ray.config.loading import load_config
        from epd_ray.runs.distill import distill as fit

        settings = load_config(config, overrides or [])
        path = out or Path("solvers", f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.name}")
        with observed() as observer:
            lines = fit(settings, path, observer)
        say(lines)


def fetch(overrides: OverridesArgument = None, config: ConfigOption = None) -> None:
    """Place a configuration's weights on every node, once."""
    with ending():
        from epd_ray.config.loading import load_config
        from epd_ray.runs.fetch import fetch as place

        with observed() as observer:
            lines = place(load_config(config, overrides or []), observer)
        say(lines)


def doctor() -> None:
    """Say what is installed, which device is used, and what is missing."""
    with ending():
        from epd_ray.runs.doctor import examine, show

        if not show(examine()):
            raise typer.Exit(1)


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CASE",
            help="overhead, overlap, efficiency, search, distill, batching, latency, step, throughput, scale, flat, "
            "faults, scoring. None: all of them, which takes hours; with --model those that take one.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Of batching, latency, step and throughput: shapes, or random weights in a published architecture "
            "(sd15-random, sdxl-random, sd3-random, flux-random).",
            show_default="the case's own",
        ),
    ] = None,
    size: Annotated[
        Literal["full", "small"] | None, typer.Option(help="Of random models.", show_default="full on a GPU")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="The network of a random model, with torch.compile.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the records there, as JSON.", parser=local_path)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds 0 to this, exclusive, of efficiency (5) and search (3).")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where efficiency and search keep what they have measured, and go on from after a stop.",
            show_default="bench",
            parser=local_path,
        ),
    ] = None,
) -> None:
    """Measure this system against something in the same run."""
    with ending():
        from epd_ray.bench.cases import Options
        from epd_ray.bench.kept import FOLDER
        from epd_ray.bench.runner import run

        run(cases or [], Options(model, size, compile, seeds, keep or FOLDER), out)
