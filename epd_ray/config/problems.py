"""What is wrong with a configuration, and what differs between two of them: one line each."""

import re
from collections.abc import Sequence
from types import UnionType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from epd_ray.config.run_config import RunConfig
from epd_ray.config.values import Section
from epd_ray.errors import SHOWN_CHARS, shown
from epd_ray.registry import did_you_mean

_EXPECTED = {
    "greater_than": "more than {gt:.15g} is needed",
    "greater_than_equal": "at least {ge:.15g} is needed",
    "less_than": "less than {lt:.15g} is needed",
    "less_than_equal": "at most {le:.15g} is possible",
    "too_short": "at least {min_length} is needed",
    "model_type": "expected a mapping of keys",
    "tuple_type": "expected a list, such as [a, b]",
    "string_type": "expected text",
    "string_pattern_mismatch": "expected letters, digits, - and _ alone",
}


def problems_of(error: ValidationError, owner: type[Section] = RunConfig) -> list[str]:
    """Say what is wrong with a configuration, one line each.

    Args:
        error: what pydantic raised.
        owner: the section, or the whole configuration, that was validated.
    """
    return [_problem(details, owner) for details in error.errors()]


def _problem(error: ErrorDetails, whole: type[Section]) -> str:
    """One line with the key, its value and what is expected."""
    location, context = [_bounded(part) for part in error["loc"] if part != "[key]"], error.get("ctx", {})
    key, kind = ".".join(location), error["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(location, whole)}"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    if kind == "literal_error":
        choices = re.findall(r"'(.*?)'", context["expected"])
        return f"{key}: unknown {shown(error['input'])}{_nearest(error['input'], choices)}"
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else error["msg"]
    value = "null" if error["input"] is None else shown(error["input"])
    return f"{key}: is {value}, {expected.replace('Input should be', 'expected')}"


def _bounded(part: int | str) -> str:
    return shown(part)[1:-1] if isinstance(part, str) and len(part) > SHOWN_CHARS else str(part)


def _nearest(value: object, choices: Sequence[str]) -> str:
    return did_you_mean(value if isinstance(value, str) else "", choices)


def _nearest_key(location: Sequence[str], whole: type[Section]) -> str:
    *parents, key = location
    owner: Any = whole
    for part in parents:  # a section's key, or a name in a mapping of sections
        owner = _fields(owner)[part].annotation if _fields(owner) else get_args(owner)[1]
    homes = [f"{name}.{key}" for name, field in whole.model_fields.items() if key in _fields(field.annotation)]
    named = " or ".join(map(repr, homes))
    return f"; did you mean {named}?" if homes and not parents else did_you_mean(key, _fields(owner))


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    if isinstance(annotation, UnionType):  # a section, or null
        annotation = get_args(annotation)[0]
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation.model_fields if is_section else {}


def first_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say which key is the first whose value differs: "rdpo.lr was 0.002, now 0.001". None if no key does."""
    old, new = flat(before), flat(now)
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            return f"{key} was {shown(old.get(key))}, now {shown(new.get(key))}"
    return None


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"rdpo": {"lr": 0.001}} as {"rdpo.lr": 0.001}."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
