"""What a judge is told: a template with the prompt, columns of its row, and the marks that it may give."""

import json
import string
from collections.abc import Mapping

from pydantic import JsonValue

from epd_ray.errors import ConfigError, shown
from epd_ray.types import Metadata

TEMPLATES = {
    "number": 'This picture was drawn for the prompt "{prompt}". How well does it show everything that the prompt asks '
    "for? Answer with one number from {low} (nothing of it) to {high} (all of it), and with nothing else.",
    "json": 'This picture was drawn for the prompt "{prompt}". How well does it show everything that the prompt asks '
    'for? Answer with JSON alone, {{"{key}": a number from {low} (nothing of it) to {high} (all of it)}}.',
}
"""Form of the answer -> the template where none is given."""
OWN = ("prompt", "low", "high", "key")
"""Fields of a template that are no columns: the prompt, the bounds of the marks, and the key of a JSON answer."""


def columns_of(template: str) -> tuple[str, ...]:
    """The columns that a template names, in their order.

    Args:
        template: text with fields such as {prompt} or {category}; {{ and }} stand for braces.

    Raises:
        ConfigError: a brace is alone, or a field has more than a name.
    """
    fix = "write {name} with the name of a column, and {{ or }} for a brace"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError([f"judge reward head: template cannot be read ({error}): {fix}"]) from None
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name.strip() or form or conversion:
            wrong = f"template has the field {shown(name)}, which is no plain name"
            raise ConfigError([f"judge reward head: {wrong}: {fix}"])
        names.append(name)
    return tuple(dict.fromkeys(name for name in names if name not in OWN))


def filled(template: str, values: Mapping[str, JsonValue], row: Metadata) -> str:
    """The template with its fields filled in; what is no text stands as JSON.

    Args:
        template: see `columns_of`.
        values: the values of the fields in OWN.
        row: the values of the columns.
    """
    text = []
    for before, name, _, _ in string.Formatter().parse(template):
        text.append(before)
        if name is not None:
            value = values[name] if name in OWN else row[name]
            text.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(text)
