"""Names for things that load on demand, with a suggestion when a name is misspelt."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

from epd_ray.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean "clip"?' or, when nothing is near, the list of what there is."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(options)}"


class Registry(Generic[T]):
    """Maps a name to "module:attribute", imported when first asked for.

    Args:
        kind: what the entries are, for messages ("reward head").
        entries: name -> "module:attribute".
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def register(self, name: str, target: str) -> None:
        """Add an entry.

        Raises:
            ValueError: the name is taken, or the target is not "module:attribute".
        """
        if name in self._entries:
            taken = self._entries[name]
            raise ValueError(f"{self.kind} {name!r} is registered already, as {taken!r}: pick another name")
        if target.count(":") != 1:
            raise ValueError(f"{self.kind} {name!r}: target {target!r} is not of the form 'module:attribute'")
        self._entries[name] = target

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def targets(self) -> set[str]:
        """Every "module:attribute"."""
        return set(self._entries.values())

    def get(self, name: str) -> Callable[..., T]:
        """The factory behind a name.

        A name with a colon is taken as "module:attribute" itself, so that one's own class needs no registration.

        Raises:
            UnknownNameError: no such entry.
        """
        target = self._entries.get(name, name)
        if ":" not in target:
            raise UnknownNameError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._entries)}")
        module, _, attribute = target.partition(":")
        wrong = f"{self.kind} {name!r} cannot be imported"
        if not module or module.startswith("."):
            raise UnknownNameError(f"{wrong}: expected module:attribute")
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UnknownNameError(f"{wrong}: {error}") from error
        if not hasattr(found, attribute):
            raise UnknownNameError(f"{wrong}: module {module!r} has no attribute {attribute!r}")
        return cast(Callable[..., T], getattr(found, attribute))

    def build(self, name: str, options: Mapping[str, Any]) -> T:
        """Make the thing behind a name from keyword arguments.

        Raises:
            UnknownNameError: no such entry.
            ConfigError: an argument that its constructor lacks or does not know.
        """
        factory = self.get(name)
        try:
            inspect.signature(factory).bind(**options)
        except TypeError as error:
            given = ", ".join(options) or "none"
            raise ConfigError([f"{self.kind} {name!r}: {error} (options given: {given})"]) from error
        return factory(**options)
