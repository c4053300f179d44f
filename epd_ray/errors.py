"""One exception class per kind of failure. A message names the value, the bound and the fix in one line."""

import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class EpdRayError(Exception):
    """Base class of every error that the user can fix; the command line prints it without a traceback."""


class UnknownNameError(EpdRayError):
    """A name is not in the registry, or what it refers to cannot be imported."""


class ConfigError(EpdRayError):
    """One or more values of a configuration are wrong; all of them are reported together.

    Args:
        problems: one message per wrong value.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class ScheduleError(EpdRayError):
    """A solver cannot follow the given sigmas."""


class TableError(EpdRayError):
    """A solver table breaks an invariant, or a solver file cannot be read."""


class ModelError(EpdRayError):
    """A model is missing, damaged, or of an unsupported kind."""


class HubError(ModelError):
    """A model is not in the local cache, and the hub that has it cannot be reached."""


class PromptError(EpdRayError):
    """A prompt file cannot be used, or holds fewer prompts than needed."""


class RewardError(EpdRayError):
    """A reward head failed, or returned something that is not a finite number. No score takes its place.

    Args:
        head: name of the reward head.
        problem: what went wrong, in one line.
        rollout_ids: the rollouts that were not scored; empty where none is to be named.
    """

    def __init__(self, head: str, problem: str, rollout_ids: Sequence[str] = ()) -> None:
        where = f" (rollouts {', '.join(rollout_ids)})" if rollout_ids else ""
        super().__init__(f"reward head {head!r}: {problem}{where}")
        self.head, self.problem, self.rollout_ids = head, problem, tuple(rollout_ids)

    def __reduce__(self) -> tuple[type["RewardError"], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.head, self.problem, self.rollout_ids)


class SourceError(EpdRayError):
    """The source of pictures to score does not exist, cannot be read, or holds an id twice."""


class PictureError(EpdRayError):
    """A picture cannot be decoded. The message is the reason alone; which picture it is, the caller adds."""


class MetricError(EpdRayError):
    """A metric cannot be computed from the given pictures, features or statistics."""


class SideBySideError(EpdRayError):
    """Two folders of pictures cannot be paired, or votes do not belong to this comparison page."""


class RunDirectoryError(EpdRayError):
    """An output directory cannot be read or written, or holds another run."""


class TaskError(EpdRayError):
    """A task failed on every actor that tried it."""


class PlacementError(EpdRayError):
    """The cluster has too few free resources for the actors."""


class ClusterError(EpdRayError):
    """A Ray cluster cannot be joined, or its object store is full."""


PROGRAMMING = (TypeError, AttributeError, LookupError, NameError, AssertionError)
"""The exceptions that a programming mistake raises. Libraries also raise the first three for damaged files."""


def is_own_bug(error: BaseException) -> bool:
    """Whether an error is a programming mistake in this package, which must be shown with its traceback.

    It is one when its type is in PROGRAMMING and its traceback ends in this package, or in the standard library called
    from this package. When the traceback ends in another library, the user's file or argument may be wrong instead.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    without_stdlib = [package for package in packages if package not in sys.stdlib_module_names]
    return isinstance(error, PROGRAMMING) and without_stdlib[-1:] == [__name__.partition(".")[0]]


class _Bounded(reprlib.Repr):
    """A `repr` that looks at a few entries of each container only, so that no value makes it slow or large."""

    _KINDS = (int, str, dict, list, tuple, set, frozenset)

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = 4
        self.maxstring = self.maxother = 60
        self.maxlong = 30

    def repr1(self, x: object, level: int) -> str:
        # reprlib goes by the exact type and leaves all others, such as an OrderedDict, to their own repr
        if isinstance(x, bytes):
            return self.repr_instance(x[: self.maxother], level)
        kind = next((kind for kind in self._KINDS if isinstance(x, kind)), None)
        made: str = getattr(self, f"repr_{kind.__name__}")(x, level) if kind else super().repr1(x, level)
        return made

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > _MOST_BITS:  # Python refuses to write more than some thousand digits
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_MOST_BITS = 1024  # those of the largest float
_BOUNDED = _Bounded()
SHOWN_CHARS = 200


def shown(value: object) -> str:
    """The `repr` of a stranger's value for a message: one line of at most SHOWN_CHARS characters, whatever the value.

    A `repr` of its own may be gigabytes long: YAML aliases let 450 bytes stand for a billion entries. Text is shown
    whole as far as the line goes, because it may be a path.
    """
    text = repr(value[:SHOWN_CHARS]) if isinstance(value, str) else " ".join(_BOUNDED.repr(value).split())
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."


def first_problem(error: "ValidationError") -> str:
    """The first problem that pydantic found in a stranger's record, with the place and the value, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"][:_MOST_PARTS]))
    named = f"{shown(where)[1:-1]}: " if where else ""
    return f"{named}{first['msg'][:SHOWN_CHARS]} (given: {shown(first['input'])})"


_MOST_PARTS = 8  # of the path to a value
_DAMAGE = {
    RecursionError: "it is nested too deeply",
    MemoryError: "it needs more memory than there is",
    OverflowError: "a number in it is too large",
    UnicodeError: "it is not valid UTF-8",
    KeyError: "a key is missing in it",
}


@contextmanager
def importing(kind: Callable[[str], EpdRayError], what: object) -> Iterator[None]:
    """The guard around each importer of a stranger's file: what the file makes Python raise becomes one line.

    It does not replace checks that know the file's form and name a fix; it holds where none of them looked.

    Args:
        kind: the class of the error to raise, or what makes it of the message alone.
        what: the file or the value that is read, for the message.

    Raises:
        EpdRayError: what `kind` makes, for each of the exceptions in _DAMAGE.
    """
    try:
        yield
    except tuple(_DAMAGE) as error:
        why = next(said for raised, said in _DAMAGE.items() if isinstance(error, raised))
        detail = f" ({shown(error.args[0])})" if isinstance(error, KeyError) and error.args else ""
        raise kind(f"{what} cannot be read: {why}{detail}") from error
