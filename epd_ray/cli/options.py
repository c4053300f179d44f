"""How commands are declared: the options of a command as one record, and flags that the help shows as flags."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

Record = TypeVar("Record")


class _PlainFlags:
    """Lets the help show a flag as `--retry`, where Typer shows `--retry <bool>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if isinstance(param, TyperOption) and param.is_flag:
                param.metavar = ""
        return params


class _Command(_PlainFlags, TyperCommand):
    pass


class _Group(_PlainFlags, TyperGroup):
    pass


class Commands(typer.Typer):
    """A group of commands.

    Args:
        help: the sentence that the help shows above the commands; None where the group's callback has a docstring.
        epilog: the sentence that the help shows below the commands.
    """

    def __init__(self, help: str | None = None, epilog: str | None = None) -> None:
        quiet = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
        super().__init__(cls=_Group, help=help, epilog=epilog, **quiet)  # type: ignore[arg-type]

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """See typer.Typer.command."""
        return super().command(name, **{"cls": _Command, **options})


def taking(record: type[Record]) -> Callable[[Callable[[Record], None]], Callable[..., None]]:
    """Make a Typer command from a function that takes one record; each field of the record becomes an option.

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
