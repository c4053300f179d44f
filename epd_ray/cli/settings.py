"""`epd-ray config`: the keys of a run's configuration."""

import shutil
import textwrap
from typing import Annotated

import typer

from epd_ray.cli.common import ending


def config(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION]",
            help="A section or a key, such as rdpo or rdpo.lr.",
            show_default="all sections",
        ),
    ] = None,
) -> None:
    """List the keys of a configuration with their types, defaults and meanings."""
    with ending():
        from epd_ray.config.listing import keys_of

        width = shutil.get_terminal_size().columns
        for key in keys_of(section):
            other = f" (other models than the embedded one: {key.elsewhere})" if key.elsewhere else ""
            typer.echo(_wrapped(f"{key.name}: {key.type}, default {key.default}{other}", "", width))
            typer.echo(_wrapped(key.meaning, "    ", width))


def _wrapped(text: str, indent: str, width: int) -> str:
    return textwrap.fill(
        text,
        max(width, 40),
        initial_indent=indent,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
