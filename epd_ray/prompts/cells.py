"""Cells of the columns that reward heads read: what JSON can say, whatever kind of file it came from."""

import math
from collections.abc import Iterable

from pydantic import JsonValue

from epd_ray.errors import PromptError, shown


class Pairs(dict[str, object]):
    """A JSON object that knows all of its keys, also those that occur twice."""

    def __init__(self, pairs: Iterable[tuple[str, object]]) -> None:
        every = list(pairs)
        super().__init__(every)
        self.names = [name for name, _ in every]


def json_cell(value: object, column: str, where: str) -> JsonValue:
    """The value of a cell in plain JSON values; None for an empty one.

    A cell is empty that holds null, blank text, or NaN, as which pandas stores a number that is missing.

    Args:
        value: what the file holds.
        column: the name of the column, for the message.
        where: the row, for the message.

    Raises:
        PromptError: the value is none that JSON can say, such as bytes, a date or an infinite number.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str) and not value.strip():
        return None
    return _plain(value, column, where)


def _plain(value: object, column: str, where: str) -> JsonValue:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    if isinstance(value, list):
        return [_plain(item, column, where) for item in value]
    if isinstance(value, dict):
        if isinstance(value, Pairs) and len(value) < len(value.names):
            twice = next(name for name in value.names if value.names.count(name) > 1)
            raise PromptError(f"{where}: {column!r} has the key {shown(twice)} twice: keep one of them")
        return {str(name): _plain(item, column, where) for name, item in value.items()}
    kinds = "text, a number, true or false, a list or an object"
    raise PromptError(f"{where}: {column!r} is {shown(value)} ({type(value).__name__}), expected {kinds}")
