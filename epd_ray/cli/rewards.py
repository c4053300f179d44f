"""`epd-ray rewards`: environments of the reward packages, a server for any head, and checkpoint conversion."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from epd_ray.cli.common import ending
from epd_ray.cli.options import Commands
from epd_ray.errors import ConfigError, shown

app = Commands(help="List, install, convert and serve reward heads.")


@app.command("list")
def list_() -> None:
    """List the names of the reward heads."""
    with ending():
        from epd_ray.rewards import HEADS

        for name in HEADS.names():
            typer.echo(name)


@app.command()
def install(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The package: imagereward, hpsv2, or fid, which extracts the Inception features of the FID.",
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Build the environment again even if it is there already.")
    ] = False,
) -> None:
    """Build the Python environment of a published package, as a reward head with `backend: package` needs it."""
    with ending():
        from epd_ray.actors.environments import install as build

        typer.echo(f"python: {build(name, force=force, say=lambda line: typer.echo(line, err=True))}")


@app.command()
def convert(
    head: Annotated[Literal["mps"], typer.Argument(metavar="HEAD", help="The head whose checkpoint it is: mps.")],
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="The checkpoint, a pickled module. None of its code is run.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
) -> None:
    """Convert a checkpoint that is a pickled module to a safetensors file."""
    with ending():
        from epd_ray.rewards.checkpoints import convert_module

        typer.echo(f"{target}: {convert_module(source, target)} tensors of {head}")


@app.command()
def serve(
    head: Annotated[
        str,
        typer.Argument(metavar="HEAD", help="The name of a head (see epd-ray rewards list), or module:Class."),
    ],
    options: Annotated[
        str, typer.Option(metavar="JSON", help="The constructor arguments of the head, as a JSON object.")
    ] = "{}",
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            help="The address to listen on. By default only this machine can connect; an address that others can reach "
            "needs a token in the environment variable EPD_RAY_REWARD_TOKEN.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on. 0 takes any free port.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="The number of processes that score.")] = 1,
    num_gpus: Annotated[
        float,
        typer.Option(
            min=0, help="The GPUs that each replica reserves, a share of one or several. 0 scores on the CPU."
        ),
    ] = 0.0,
) -> None:
    """Serve a head over HTTP, so that runs on other machines can use it through the head `http`."""
    with ending():
        from epd_ray.storage.documents import parse_json  # here, since pydantic takes long to import

        what = f"--options {shown(options)}"
        arguments = parse_json(options, what, lambda said: ConfigError([said]), "give an object")
        if not isinstance(arguments, dict):
            raise ConfigError([f'--options {shown(options)} is no JSON object, such as {{"model": "shapes-clip"}}'])
        from epd_ray.actors.serving import serve_head

        serve_head(head, arguments, host=host, port=port, replicas=replicas, num_gpus=num_gpus, say=typer.echo)
