"""What the pages have in common: templates in one style, pictures inside the file, signed numbers."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from epd_ray.errors import RunDirectoryError


def page_template(name: str) -> Template:
    """A template of the package; templates/style.css is the look of them all."""
    environment = Environment(
        loader=PackageLoader("epd_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = signed
    return environment.get_template(name)


def signed(value: float, digits: int) -> str:
    """With its sign, minus as a minus sign."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def digits(widths: Sequence[float]) -> int:
    """Decimals for two digits of half the narrowest of intervals' widths, between 3 and 5."""
    narrowest = min((width / 2 for width in widths if width > 0), default=0.01)
    return min(5, max(3, 1 - math.floor(math.log10(narrowest))))


def open_picture(path: Path) -> Image.Image | None:
    """RGB, or None where there is no such file.

    Raises:
        RunDirectoryError: a file that is no picture.
    """
    if not path.is_file():
        return None
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read as a picture: make the samples again") from error


def data_uri(path: Path) -> str | None:
    """A picture of at most 384 pixels, lossless where it is small anyway; None where there is no such file.

    Raises:
        RunDirectoryError: a file that is no picture.
    """
    if (picture := open_picture(path)) is None:
        return None
    picture.thumbnail((384, 384), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=max(picture.size) <= 128, quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
