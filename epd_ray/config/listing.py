"""Every key of a configuration with its type, default and meaning, as the sections declare them."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from epd_ray.config.loading import FOR_OTHER_MODELS
from epd_ray.config.run_config import RunConfig
from epd_ray.config.values import Section
from epd_ray.errors import UnknownNameError, shown
from epd_ray.registry import did_you_mean

ANY_NAME = "<name>"
_TYPES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        name: the key with its dots; `<name>` stands for the name of a reward head.
        type: the kind of value in words, or its choices.
        default: the default as JSON, which YAML reads too.
        elsewhere: the default for models other than the embedded one as JSON; None where it is the same.
        meaning: sentences with the unit, the bounds, and what null means.
    """

    name: str
    type: str
    default: str
    elsewhere: str | None
    meaning: str


def keys_of(asked: str | None = None) -> list[Key]:
    """The keys of a configuration in the order of its sections.

    Args:
        asked: a section, which stands for its keys, or a key, such as "rdpo", "rdpo.lr" or "rewards.clip.head"; None
            takes all keys.

    Raises:
        UnknownNameError: there is no such section or key; the message has near names.
    """
    keys = list(_keys("", RunConfig))
    if asked is None:
        return keys
    found = [key for key in keys if _within(key.name, asked)]
    if not found:
        raise UnknownNameError(f"unknown section or key {shown(asked)}{_near(asked, [key.name for key in keys])}")
    return found


def _keys(prefix: str, section: type[Section]) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        key, nested = f"{prefix}{name}", _nested(field.annotation)
        if nested is not field.annotation:
            other = _elsewhere(key)
            yield Key(key, _type(field.annotation), _json(field.default), other, field.description or "")
        if nested is not None:
            inner = f"{key}.{ANY_NAME}." if get_origin(field.annotation) is dict else f"{key}."
            yield from _keys(inner, nested)


def _nested(annotation: Any) -> type[Section] | None:
    """The section that a key is, may be, or has by name."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return " | ".join(parts)
    if origin is tuple:
        return f"list of {_type(parts[0])}"
    if origin is dict or _nested(annotation) is annotation:
        return "mapping"
    return _TYPES[annotation] if annotation in _TYPES else " or ".join(map(_type, parts))


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda section: section.model_dump(mode="json", exclude_defaults=True))


def _elsewhere(key: str) -> str | None:
    section, _, name = key.partition(".")
    values = FOR_OTHER_MODELS.get(section, {})
    if not name:
        return _json(values) if values else None
    return _json(values[name]) if name in values else None


def _within(key: str, asked: str) -> bool:
    """Whether a key is the one that was asked for, or lies in that section."""
    parts, wanted = key.split("."), asked.split(".")
    return len(wanted) <= len(parts) and all(
        part in (want, ANY_NAME) for part, want in zip(parts, wanted, strict=False)
    )


def _near(asked: str, keys: list[str]) -> str:
    homes = [key for key in keys if key.rpartition(".")[2] == asked]
    if homes:
        return f"; did you mean {' or '.join(map(shown, homes))}?"
    near_key = "." in asked and difflib.get_close_matches(asked, keys, n=1)
    return did_you_mean(asked, keys if near_key else {key.partition(".")[0] for key in keys})
