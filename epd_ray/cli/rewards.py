"""`epd-ray rewards ...`: environments of the reward packages, a server for any head, checkpoint conversion."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from epd_ray.cli.common import ending
from epd_ray.errors import ConfigError

app = typer.Typer(help="Reward heads: package environments, a server, conversion.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """The heads by name."""
    with ending():
        from epd_ray.rewards import HEADS

        for name in HEADS.names():
            typer.echo(name)


@app.command()
def install(
    name: Annotated[str, typer.Argument(help="imagereward, hpsv2, or fid (of Inception's features).")],
    force: Annotated[bool, typer.Option(help="Build it again.")] = False,
) -> None:
    """Build the Python environment of a published package: a reward's for `backend: package`, or the FID's."""
    with ending():
        from epd_ray.actors.environments import install as build

        typer.echo(f"python: {build(name, force=force, say=lambda line: typer.echo(line, err=True))}")


@app.command()
def convert(
    head: Annotated[Literal["mps"], typer.Argument(help="Which head's checkpoint.")],
    source: Annotated[Path, typer.Argument(help="A pickled module; nothing in it is run.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors to write.")],
) -> None:
    """Turn a checkpoint that is a pickled module into safetensors, once."""
    with ending():
        from epd_ray.rewards.checkpoints import convert_module

        typer.echo(f"{target}: {convert_module(source, target)} tensors of {head}")


@app.command()
def serve(
    head: Annotated[str, typer.Argument(help="A head's name (epd-ray rewards list), or module:Class.")],
    options: Annotated[str, typer.Option(metavar="JSON", help="The head's constructor arguments.")] = "{}",
    host: Annotated[str, typer.Option(help="Loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that score.")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="Per replica.")] = 0.0,
) -> None:
    """Serve a head over HTTP, for the `http` head of other machines."""
    with ending():
        try:
            arguments = json.loads(options)
        except json.JSONDecodeError as error:
            raise ConfigError([f"--options {options!r} is not JSON: {error}"]) from error
        if not isinstance(arguments, dict):
            raise ConfigError([f'--options {options!r} is no JSON object, such as {{"model": "shapes-clip"}}'])
        from epd_ray.actors.serving import serve_head

        serve_head(head, arguments, host=host, port=port, replicas=replicas, num_gpus=num_gpus, say=typer.echo)
