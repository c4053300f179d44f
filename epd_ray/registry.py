"""Names that are imported on demand: registries, which suggest a name for a misspelt one, and what a package offers."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

from epd_ray.errors import ConfigError, UnknownNameError, shown

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'clip'?", or the known names when none of them is similar."""
    options = sorted(known)
    similar = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {shown(similar[0])}?" if similar else f"; known: {', '.join(options)}"


class Registry(Generic[T]):
    """Maps names to targets "module:attribute"; a target is imported when it is first used.

    Args:
        kind: what an entry is called in error messages, such as "reward head".
        entries: maps each name to its target "module:attribute".
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def register(self, name: str, target: str) -> None:
        """Add an entry.

        Raises:
            ValueError: the name is already registered, or the target is not of the form "module:attribute".
        """
        if name in self._entries:
            taken = self._entries[name]
            raise ValueError(f"{self.kind} {shown(name)} is already registered as {shown(taken)}: choose another name")
        if target.count(":") != 1:
            raise ValueError(f"{self.kind} {shown(name)}: target {shown(target)} is not of the form 'module:attribute'")
        self._entries[name] = target

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def targets(self) -> set[str]:
        """All registered targets "module:attribute"."""
        return set(self._entries.values())

    def get(self, name: str) -> Callable[..., T]:
        """Import and return the class or function behind a name.

        A name with a colon is itself read as "module:attribute", so users need not register their own classes.

        Raises:
            UnknownNameError: the name is not registered, or its target cannot be imported.
        """
        target = self._entries.get(name, name)
        if ":" not in target:
            raise UnknownNameError(f"unknown {self.kind} {shown(name)}{did_you_mean(name, self._entries)}")
        module, _, attribute = target.partition(":")
        wrong = f"{self.kind} {shown(name)} cannot be imported"
        if not module or module.startswith("."):
            raise UnknownNameError(f"{wrong}: give it as module:attribute")
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UnknownNameError(f"{wrong}: {error}") from error
        if not hasattr(found, attribute):
            raise UnknownNameError(f"{wrong}: module {shown(module)} has no attribute {shown(attribute)}")
        return cast(Callable[..., T], getattr(found, attribute))

    def build(self, name: str, options: Mapping[str, Any]) -> T:
        """Call the class or function behind a name.

        Args:
            name: as for `get`.
            options: keyword arguments of the call.

        Raises:
            UnknownNameError: the name is not registered, or its target cannot be imported.
            ConfigError: a required argument is missing, or an argument is unknown.
        """
        factory = self.get(name)
        try:
            inspect.signature(factory).bind(**options)
        except TypeError as error:
            given = ", ".join(options) or "none"
            raise ConfigError([f"{self.kind} {shown(name)}: {error} (options given: {given})"]) from error
        return factory(**options)


def lazy_names(package: str, targets: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose modules import heavy libraries, such as torch.

    Args:
        package: `__name__` of the package.
        targets: each offered name with the module that defines it. A name must not equal that of a submodule of the
            package: Python binds an imported submodule to its name, and `__getattr__` would not be asked.

    Returns:
        The two functions, to be assigned at the top level of the package.
    """

    def get(name: str) -> object:
        if name not in targets:
            raise AttributeError(f"module {shown(package)} has no attribute {shown(name)}")
        return getattr(importlib.import_module(targets[name]), name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *targets})

    return get, names
