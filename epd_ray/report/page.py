"""What all pages share: templates in one style, pictures inside the file, and signed numbers."""

import base64
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from epd_ray.errors import PictureError, RunDirectoryError
from epd_ray.storage.pictures import decode_picture


def page_template(name: str) -> Template:
    """Open a template of the package; all of them include templates/style.css."""
    environment = Environment(
        loader=PackageLoader("epd_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = signed
    environment.filters["typeset"] = typeset
    return environment.get_template(name)


def signed(value: float, digits: int) -> str:
    """Write a number with its sign, and with a minus sign in place of a hyphen."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def typeset(text: str) -> str:
    """Write the numbers of a text as a page shows them: with minus signs, and with intervals that no line breaks."""
    signs = re.sub(r"(?<![\w.])-(?=\.?\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"\[[^]]*]", lambda interval: interval[0].replace(" ", "\N{NO-BREAK SPACE}"), signs)


def digits(widths: Sequence[float]) -> int:
    """Choose how many decimals show two digits of the uncertainty.

    Args:
        widths: the widths of the intervals of some values; half of the narrowest one counts as the uncertainty.

    Returns:
        A number of decimals from 3 to 5.
    """
    narrowest = min((width / 2 for width in widths if width > 0), default=0.01)
    return min(5, max(3, 1 - math.floor(math.log10(narrowest))))


def open_picture(path: Path) -> Image.Image | None:
    """Open a picture as RGB; None if there is no such file.

    Raises:
        RunDirectoryError: the file is no picture.
    """
    if not path.is_file():
        return None
    try:
        return decode_picture(path)
    except PictureError as error:
        raise RunDirectoryError(f"{path} cannot be read as a picture ({error}): make the samples again") from error


def data_uri(path: Path) -> str | None:
    """Read a picture as a data URI, reduced to at most 384 pixels a side; None if there is no such file.

    Pictures of at most 128 pixels a side are stored without loss.

    Raises:
        RunDirectoryError: the file is no picture.
    """
    if (picture := open_picture(path)) is None:
        return None
    picture.thumbnail((384, 384), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=max(picture.size) <= 128, quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
