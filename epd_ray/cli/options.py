"""The options of a command as one record, instead of a long list of arguments."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

Record = TypeVar("Record")


def taking(record: type[Record]) -> Callable[[Callable[[Record], None]], Callable[..., None]]:
    """Make a Typer command of a function that takes one record; each field of the record is an option.

    Args:
        record: a dataclass whose fields are annotated as Typer annotates the parameters of a function. A field without
            a default is an option that must be given.

    Returns:
        A decorator. The command keeps the name and the docstring of the function.
    """
    hints = get_type_hints(record, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(record)  # type: ignore[arg-type]
    ]

    def decorate(function: Callable[[Record], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            function(record(**given))

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = hints
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate
