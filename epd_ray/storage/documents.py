"""JSON documents that people bring: read with bounds, so that what stands in them twice or too deep is named."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from epd_ray.errors import SHOWN_CHARS, EpdRayError, first_problem, importing, shown

MOST_LEVELS = 100

Kind = Callable[[str], EpdRayError]
Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path, kind: Kind, fix: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        kind: makes the error of its message.
        fix: what to do about a file that cannot be read, for the message.

    Raises:
        EpdRayError: of this kind, see `parse_json`; or the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror or error} ({fix})") from error
    return parse_json(data, path, kind, fix)


def parse_json(data: bytes | str, what: object, kind: Kind, fix: str, *, finite: bool = True) -> Any:
    """Read a JSON document.

    Args:
        data: the document, UTF-8 where it is bytes.
        what: what it is, for the message.
        kind: makes the error of its message.
        fix: what to do about it, for the message.
        finite: whether NaN and infinities, which Python writes although JSON has none, are refused.

    Raises:
        EpdRayError: of this kind; it is not JSON, has a key twice, a number that no float64 holds, more than
            MOST_LEVELS containers in each other, or text that UTF-8 cannot hold.
    """
    with importing(lambda said: kind(f"{said} ({fix})"), what):
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        try:
            found = json.loads(
                text, object_pairs_hook=_unique, parse_constant=_refuse if finite else float, parse_float=_finite
            )
            _check(found)
        except ValueError as error:
            raise kind(f"{what} is not valid JSON: {str(error)[: 2 * SHOWN_CHARS]} ({fix})") from error
    return found


def parse_record(
    model: type[Model], data: bytes | str, what: object, kind: Kind, fix: str, *, finite: bool = True
) -> Model:
    """Read a JSON document of a known form.

    Args:
        model: the form.
        data: see `parse_json`, as the other arguments.

    Raises:
        EpdRayError: of this kind; it is not JSON, or has another form.
    """
    found = parse_json(data, what, kind, fix, finite=finite)
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise kind(f"{what} is damaged ({first_problem(error)}): {fix}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:SHOWN_CHARS]} is beyond float64")
    return number


def _check(found: object) -> None:
    level, depth = [found], 0
    while level:
        for value in level:
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair could not be written again
        values = [value for value in level if isinstance(value, dict | list)]
        if values and depth == MOST_LEVELS:
            raise ValueError(f"it has more than {MOST_LEVELS} levels")
        level = [part for value in values for part in (value.values() if isinstance(value, dict) else value)]
        level += [key for value in values if isinstance(value, dict) for key in value]
        depth += 1
