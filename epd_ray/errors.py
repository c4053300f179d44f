"""One class per kind of failure. Messages name the value, the bound and the fix, in one line."""

import sys
import traceback
from collections.abc import Sequence


class EpdRayError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""


class UnknownNameError(EpdRayError):
    """A name that no registry entry has."""


class ConfigError(EpdRayError):
    """One or more wrong values in a run configuration, all reported at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class ScheduleError(EpdRayError):
    """Sigmas that no solver can follow."""


class TableError(EpdRayError):
    """A solver table that breaks an invariant, or a solver file that cannot be read."""


class ModelError(EpdRayError):
    """A model directory that is missing, damaged, or of an unsupported kind."""


class PromptError(EpdRayError):
    """A prompt file that cannot be used."""


class RewardError(EpdRayError):
    """A reward head that answered with something that is not a reward. Never turned into a number."""

    def __init__(self, head: str, problem: str, rollout_ids: Sequence[str] = ()) -> None:
        where = f" (rollouts {', '.join(rollout_ids)})" if rollout_ids else ""
        super().__init__(f"reward head {head!r}: {problem}{where}")
        self.head, self.problem, self.rollout_ids = head, problem, tuple(rollout_ids)

    def __reduce__(self) -> tuple[type["RewardError"], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.head, self.problem, self.rollout_ids)


class MetricError(EpdRayError):
    """Pictures, features or statistics that a metric cannot be computed from."""


class SideBySideError(EpdRayError):
    """Folders of pictures that do not pair, or votes that are not of this page."""


class RunDirectoryError(EpdRayError):
    """An output directory that cannot be written, or that holds another run."""


class TaskError(EpdRayError):
    """Work that failed on every actor that tried it."""


class PlacementError(EpdRayError):
    """Actors that the cluster has no room for."""


class ClusterError(EpdRayError):
    """A Ray cluster that cannot be joined, or that ran out of room for objects."""


PROGRAMMING = (TypeError, AttributeError, LookupError, NameError, AssertionError)
"""What a mistake in a program raises; libraries raise the first three for damaged files, too."""


def is_own_bug(error: BaseException) -> bool:
    """Whether an error is a mistake in this package's own code, which must be seen with its traceback.

    It is one where the traceback ends here, or in the standard library called from here. Where it ends in another
    library, a file or an argument of the user's may be what is wrong.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    rooms = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    outside = [room for room in rooms if room not in sys.stdlib_module_names]
    return isinstance(error, PROGRAMMING) and outside[-1:] == [__name__.partition(".")[0]]
