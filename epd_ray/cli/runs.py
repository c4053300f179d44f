"""The commands that make runs and solvers, and those that examine or measure the machine."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from epd_ray.cli.common import (
    ConfigOption,
    OverridesArgument,
    RunArgument,
    checked,
    ending,
    load_checked,
    local_path,
    observed,
    place,
    say,
)
from epd_ray.cli.options import taking
from epd_ray.errors import ConfigError, shown

if TYPE_CHECKING:
    from epd_ray.config.run_config import RunConfig


def train(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The run directory to write, or a URI such as s3://bucket/run.",
            show_default="runs/<time>-<name>",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="The directory or URI of a run to continue from its last checkpoint."),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Continue the run if --out holds it already. Job schedulers need this flag.")
    ] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="A key whose changed value the continued run takes from here on, such as rdpo.lr. Repeat the option "
            "for several.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Start one actor of each kind, measure one batch, and print the memory and the hours of the run.",
        ),
    ] = False,
) -> None:
    """Fine-tune a solver, compare it with the baselines, and write a report."""
    with ending():
        if resume is not None and (config or out or overrides or dry_run or retry):
            raise ConfigError(["--resume continues with the configuration of the run: leave out everything else"])
        if retry and (out is None or dry_run):
            raise ConfigError(["--retry continues the run in --out: give --out, and leave out --dry-run"])
        if accept and resume is None and not retry:
            raise ConfigError(["--accept is about a run that goes on: give --resume or --retry too"])
        if resume is not None:
            settings, path = None, place(resume)
        else:
            settings = load_checked(config, overrides or [])
            if dry_run:
                _measure(settings)
                return
            path = place(out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{settings.name}")
    with ending(path):
        _run(settings, path, retry, accept or [])


def _measure(settings: "RunConfig") -> None:
    from epd_ray.runs.dry_run import dry_run

    with observed() as observer:
        lines = dry_run(settings, observer)
    say(lines)


def _run(settings: "RunConfig | None", path: str | Path, retry: bool, accept: list[str]) -> None:
    """Begin a run, or continue it where there are no settings for a new one."""
    if settings is not None:
        from epd_ray.runs.describe import describe

        say(describe(settings))  # before the imports that take seconds
    from epd_ray.runs import train as run
    from epd_ray.storage.places import inside

    with observed() as observer:
        if settings is None:
            headline = run.resume(path, observer, accept)
        else:
            headline = run.train(settings, path, observer, again=retry, accept=accept)
    copy = "" if isinstance(path, Path) else " (copy it to a disk to sample with it)"
    say([*headline, f"report: {inside(path, 'report.html')}", f"solver: {inside(path, 'solver')}{copy}"])


@dataclass(frozen=True)
class SampleCommand:
    """The options of `epd-ray sample`."""

    solver: Annotated[
        str,
        typer.Option(metavar="SOLVER", help="The solver: RUN/solver, a preset (see epd-ray tables list), or a hub id."),
    ]
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="The prompt of a picture. Repeat the option for several.")
    ]
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="The noise seed of the first picture. Each further picture adds 1.")
    ] = 0
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture file to write.", parser=local_path)] = Path(
        "sample.png"
    )
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model: a pipeline directory, a hub id, or the name of an embedded model.",
            show_default="the model that the solver was made for",
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, help="The scale of classifier-free guidance.", show_default="the scale of the solver"),
    ] = None
    resolution: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels per side of the picture.", show_default="the resolution of the solver"),
    ] = None
    device: Annotated[str, typer.Option(help="A torch device, or auto, which takes cuda, then mps, then cpu.")] = "auto"
    dtype: Annotated[str, typer.Option(help="The precision of the network: auto, float32, bfloat16 or float16.")] = (
        "auto"
    )
    family: Annotated[
        str | None,
        typer.Option(metavar="MODULE:CLASS", help="Your own backbone class.", show_default="the class of the solver"),
    ] = None


@taking(SampleCommand)
def sample(command: SampleCommand) -> None:
    """Draw a picture per prompt with a learned solver, and write them side by side into one file."""
    with ending():
        if command.model is not None and command.family is None:
            from epd_ray.actors.beforehand import require_model

            require_model(command.model, None, "--model")
        from epd_ray.runs.sample import SampleOptions
        from epd_ray.runs.sample import sample as draw

        c = command
        options = SampleOptions(c.model, c.guidance_scale, c.resolution, c.device, c.dtype, c.family)
        draw(c.solver, c.prompt, c.seed, c.out, options)
        typer.echo(f"picture: {c.out}")


def report(path: RunArgument) -> None:
    """Write the report.html of a run again."""
    with ending():
        from epd_ray.runs.report import write_report
        from epd_ray.storage.places import inside, place_of

        with place_of(place(path)).visited() as folder:
            written = write_report(folder).relative_to(folder)
        typer.echo(f"report: {inside(place(path), written)}")


def results(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...", help="Directories of `evaluate --suite --out`, and files of `bench --out`."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory of the document.", parser=local_path)] = Path(
        "results"
    ),
    title: Annotated[str, typer.Option(metavar="TEXT", help="The title of the document.")] = "What was measured",
) -> None:
    """Join the results of suites and benchmarks into one document, which names the command of each figure."""
    with ending():
        from epd_ray.evaluation.results import write_document

        say(write_document(title, sources, out))


def distill(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The solver directory to write.",
            show_default="solvers/<time>-<name>",
            parser=local_path,
        ),
    ] = None,
) -> None:
    """Fit a solver to a finer one without any reward (stage 1 alone). Unconditional models work too."""
    with ending():
        from epd_ray.config.loading import load_config

        settings = load_config(config, overrides or [])
        checked(settings.model_copy(update={"rewards": {}}))  # which stage 1 does without
        from epd_ray.runs.distill import distill as fit

        path = out or Path("solvers", f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.name}")
        with observed() as observer:
            lines = fit(settings, path, observer)
        say(lines)


def fetch(overrides: OverridesArgument = None, config: ConfigOption = None) -> None:
    """Download the weights that a configuration needs to every node of the cluster."""
    with ending():
        settings = load_checked(config, overrides or [])
        from epd_ray.runs.fetch import fetch as place

        with observed() as observer:
            lines = place(settings, observer)
        say(lines)


def doctor() -> None:
    """Show the installed versions, the device that is used, and what is missing."""
    with ending():
        from epd_ray.runs.doctor import examine, show

        if not show(examine()):
            raise typer.Exit(1)


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CASE",
            help="The benchmarks: overhead, overlap, efficiency, search, headroom, distill, batching, latency, step, "
            "throughput, scale, flat, faults and scoring. headroom also takes settings KEY=VALUE here.",
            show_default="all benchmarks, which takes hours; with --model, those that take a model",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model of batching, latency, step and throughput: shapes, or random weights in a published "
            "architecture (sd15-random, sdxl-random, sd3-random, flux-random).",
            show_default="the model of the benchmark",
        ),
    ] = None,
    size: Annotated[
        Literal["full", "small"] | None,
        typer.Option(help="The size of a model with random weights.", show_default="full on a GPU, else small"),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile", help="Compile the network of a model with random weights by torch.compile."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON file that also receives the results.", parser=local_path)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="The number of seeds of efficiency and search.", show_default="5 and 3")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The directory in which efficiency, search and headroom keep their results, to continue after a stop.",
            show_default="bench",
            parser=local_path,
        ),
    ] = None,
    config: ConfigOption = None,
    evals: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="The numbers of evaluations of headroom.", show_default="1,2,3,4,6,8,12,20,50"
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Pictures, or an .npz file of their statistics, from which headroom measures the Frechet distance.",
            show_default="no Frechet distance",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The network whose features the Frechet distance of headroom compares: inception or a CLIP model.",
            show_default="the model of the clip head",
        ),
    ] = None,
) -> None:
    """Run benchmarks, which measure this package and a point of comparison in the same process."""
    with ending():
        from epd_ray.bench.cases import Options
        from epd_ray.bench.kept import FOLDER
        from epd_ray.bench.runner import run

        given = cases or []
        numbers = None if evals is None else _numbers(evals)
        options = Options(model, size, compile, seeds, keep or FOLDER, config, evals=numbers)
        settings = tuple(text for text in given if "=" in text)
        options = replace(options, overrides=settings, reference=reference, features=features)
        run([text for text in given if "=" not in text], options, out)


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError([f"--evals is {shown(text)}, expected whole numbers such as 4,8,50"]) from None
