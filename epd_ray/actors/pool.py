"""Pools of actors that restart, and whose number follows the load. Calls wait in one queue for the first free actor."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from epd_ray.actors.waiting import FIRST
from epd_ray.errors import ModelError

log = logging.getLogger(__name__)

DEAD = (
    ray.exceptions.ActorDiedError,
    ray.exceptions.OutOfMemoryError,
)  # the latter where Ray ended the process without a restart
LOST_ACTOR = (*DEAD, ray.exceptions.ActorUnavailableError)
CHECK_SECONDS = 0.5  # between checks of an actor that is away
DEATHS = 3  # of an actor in a row while it loads
LOOK_BACK_SECONDS = 5.0  # over which the load is averaged
SHRINK_SECONDS = 60.0  # of low load before actors are ended
SHOWN = 4  # the largest number of actors that a message names
CALM_SECONDS = 30.0  # after a loss in which no actors are added, so that the lost one restarts first


@dataclass(frozen=True)
class Bounds:
    """The number of actors that a pool may have.

    Attributes:
        low: the smallest number of actors, >= 0, for which the cluster always has room.
        high: the largest number of actors.
        load: the number of calls per actor, waiting or in progress, that the pool aims for.
    """

    low: int
    high: int
    load: float = 1.0


@dataclass(eq=False)
class Call:
    """Work for one actor.

    Attributes:
        key: the name of the call.
        send: makes the remote call on the given actor.
        avoid: the numbers of the actors on which the call failed; it goes to other actors where there are any.
    """

    key: str
    send: "Callable[[ActorHandle[Any]], ray.ObjectRef[Any]]"
    avoid: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Ended:
    """The end of a call.

    Attributes:
        call: the call.
        number: the number of the actor.
        value: the answer of the actor; None where there is an error.
        error: the error; None where there is an answer.
        lost: whether the actor died during the call.
        late: whether the actor was ended because it gave no answer in time.
    """

    call: Call
    number: int
    value: Any = None
    error: BaseException | None = None
    lost: bool = False
    late: bool = False

    @property
    def how_lost(self) -> str:
        """What happened to the actor, as a phrase for messages."""
        return "gave no answer in time" if self.late else "was lost"


@dataclass(eq=False)
class _Member:
    number: int
    actor: ActorHandle[Any]
    state: Literal["loading", "there", "away"]
    grown: bool = False
    check: "ray.ObjectRef[Any] | None" = None
    next_check: float = 0.0
    deaths: int = 0
    since: float | None = None  # when it last answered, or got its first call; None while it may wait for room
    answered: bool = False  # whether its present process has answered a call
    late: bool = False
    calls: "dict[ray.ObjectRef[Any], Call]" = field(default_factory=dict)


class Pool:
    """Actors of one kind, whose number stays between two bounds, with at most `depth` calls each.

    The pool grows with the mean load of the last seconds, and shrinks after a minute of low load. An actor that was
    added and still waits for room is ended as soon as any other actor is lost, so that the lost one finds room.

    Args:
        what: the name of the actors in messages, such as "reward head 'clip'".
        actors: the actors at the start, as pairs of number and handle.
        make: starts another actor, and returns its number and its handle.
        load: asks an actor to load its model; the answer has the error if it cannot.
        bounds: the bounds of the number of actors.
        depth: the number of calls that an actor may have; the data of a second one arrive while the first is done.
        timeout_s: seconds without an answer after which the process of an actor is ended and replaced. The first answer
            of a process may take FIRST times as long. None sets no bound.
        removed: is called with the number of an actor that will not come back.
    """

    def __init__(
        self,
        what: str,
        actors: "Iterable[tuple[int, ActorHandle[Any]]]",
        make: "Callable[[], tuple[int, ActorHandle[Any]]]",
        load: "Callable[[ActorHandle[Any]], ray.ObjectRef[Any]]",
        bounds: Bounds,
        depth: int = 1,
        timeout_s: float | None = None,
        removed: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.what, self.bounds = what, bounds
        self._make, self._load, self._depth, self._removed = make, load, depth, removed
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self.holds: Callable[[int], bool] = lambda number: False
        """Whether the actor of this number holds data that is still needed, so that the pool must not end it."""
        self._members = [_Member(number, actor, "there") for number, actor in actors]
        self._waiting: deque[Call] = deque()
        self._loads: deque[tuple[float, int]] = deque()
        self._calm_until, self._died_loading = 0.0, 0
        self._low_since = self._counted = time.monotonic()
        self.idle_seconds = 0.0

    # -- calls --------------------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """Add a call to the end of the queue."""
        self._count_idle()  # until now: the owner may have been busy since the last tick
        self._waiting.append(call)
        self._dispatch()

    def forget(self) -> None:
        """Drop the calls that wait. Calls in progress continue, and `take` returns them as usual."""
        self._waiting.clear()

    def references(self) -> "list[ray.ObjectRef[Any]]":
        """The references of all answers that are still to come."""
        checks = [m.check for m in self._members if m.check is not None]
        return [*checks, *(reference for m in self._members for reference in m.calls)]

    def take(self, ready: "set[ray.ObjectRef[Any]]") -> list[Ended]:
        """Handle the answers that are ready, and hand out waiting calls.

        Args:
            ready: the `references` that are ready.

        Returns:
            The calls that have ended.

        Raises:
            ModelError: an actor died DEATHS times while loading.
            Exception: an actor cannot load its model. For an actor that the pool added, this is only a warning.
        """
        self._count_idle()
        ended = []
        for member in list(self._members):
            for reference in [r for r in member.calls if r in ready]:
                call = member.calls.pop(reference, None)
                member.since = time.monotonic()
                if call is not None:  # otherwise the loss of another actor has queued it again
                    ended.append(self._end(member, call, reference))
        for member in list(self._members):
            if member.check in ready:
                self._checked(member)
        self._dispatch()
        return ended

    def _end(self, member: _Member, call: Call, reference: "ray.ObjectRef[Any]") -> Ended:
        try:
            value = ray.get(reference)
        except (
            ray.exceptions.RayTaskError
        ) as error:  # before the others, because it may also be of the class of its cause
            return Ended(call, member.number, error=error)
        except LOST_ACTOR as error:
            if member.state == "there":
                log.warning("%s: actor %d was lost", self.what, member.number)
                self._away(member)
                self.give_way()
            return Ended(call, member.number, error=error, lost=True, late=member.late)
        except ray.exceptions.RayError as error:
            return Ended(call, member.number, error=error)
        member.answered = True
        return Ended(call, member.number, value)

    def _dispatch(self) -> None:
        kept: deque[Call] = deque()
        while self._waiting:
            call = self._waiting.popleft()
            member = self._choose(call)
            if member is None:
                kept.append(call)
            else:
                if not member.calls:
                    member.since = time.monotonic()
                member.calls[call.send(member.actor)] = call
        self._waiting = kept

    def _choose(self, call: Call) -> _Member | None:
        """The least loaded free actor, where possible one on which the call has not failed; None if none is free."""
        there = [m for m in self._members if m.state == "there"]
        others = [m for m in there if m.number not in call.avoid]
        free = [m for m in others or there if len(m.calls) < self._depth]
        return min(free, key=lambda m: len(m.calls), default=None)

    # -- actors that join and leave ------------------------------------------------------------------------------------

    def tick(self) -> None:
        """End actors that are late, check those that are away, and adapt the number of actors to the load.

        The owner of the pool calls this method every few tenths of a second.
        """
        self._count_idle()
        now = time.monotonic()
        for member in list(self._members):
            self._end_if_late(member, now)
        for member in self._members:
            if member.state == "away" and member.check is None and now >= member.next_check:
                member.check = member.actor.__ray_ready__.remote()
        self._follow(now)
        self._dispatch()

    def _end_if_late(self, member: _Member, now: float) -> None:
        """End the process of an actor that has not answered for too long, and count the actor as lost."""
        asked = member.calls or member.state == "loading"
        if not asked or member.since is None or member.late or member.state == "away":
            return
        seconds = now - member.since
        if seconds > self._timeout_s * (1 if member.answered else FIRST):
            said = "%s: actor %d has not answered for %.0f s: its process is ended"
            log.warning(said, self.what, member.number, seconds)
            member.late = True
            ray.kill(member.actor, no_restart=False)
            self._away(member)

    def _checked(self, member: _Member) -> None:
        reference, member.check = member.check, None
        assert reference is not None
        try:
            ray.get(reference)
        except ray.exceptions.ActorUnavailableError:
            self._away(member)
        except DEAD:
            self._died(member)
        except ray.exceptions.RayError as error:
            self._cannot_load(member, error)
        else:
            self._came(member)

    def _came(self, member: _Member) -> None:
        """Let an actor whose process has started load its model, or mark it as ready if it has loaded."""
        if member.state == "away":
            member.state, member.check = "loading", self._load(member.actor)
            member.since, member.answered, member.late = time.monotonic(), False, False
        else:
            member.state, member.deaths, self._died_loading = "there", 0, 0

    def _away(self, member: _Member) -> None:
        if member.state == "loading":
            member.deaths += 1
            if member.deaths >= DEATHS:
                self._cannot_load(member, self._too_many_deaths())
                return
        member.state, member.next_check = "away", time.monotonic() + CHECK_SECONDS

    def _died(self, member: _Member) -> None:
        """Drop an actor that does not restart, and add another one if the pool is too small."""
        if member.state == "loading":
            self._died_loading += 1
            if self._died_loading >= DEATHS:
                self._cannot_load(member, self._too_many_deaths())
                return
        self._drop(member)
        if len(self._members) < self.bounds.low:
            self._add(grown=False)

    def _too_many_deaths(self) -> ModelError:
        return ModelError(f"{self.what}: its process died {DEATHS} times while loading: out of memory?")

    def _cannot_load(self, member: _Member, error: BaseException) -> None:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None else error
        if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
            cause = ModelError(f"{self.what}: its environment cannot be set up: {last_line(error)}")
        if not member.grown:
            raise cause
        log.warning("%s: the pool adds no more actors, because one could not load: %s", self.what, cause)
        self._drop(member)
        self.bounds = Bounds(self.bounds.low, max(self.bounds.low, len(self._members)), self.bounds.load)

    def _follow(self, now: float) -> None:
        load = len(self._waiting) + sum(len(m.calls) for m in self._members)
        self._loads.append((now, load))
        while now - self._loads[0][0] > LOOK_BACK_SECONDS:
            self._loads.popleft()
        mean = sum(count for _, count in self._loads) / len(self._loads)
        wanted = min(max(math.ceil(mean / self.bounds.load), self.bounds.low), self.bounds.high)
        if wanted >= len(self._members):
            self._low_since = now
        settled = all(m.state == "there" for m in self._members) and now >= self._calm_until
        if wanted > len(self._members) and settled and now - self._loads[0][0] > LOOK_BACK_SECONDS / 2:
            for _ in range(wanted - len(self._members)):
                self._add(grown=True)
        elif now - self._low_since > SHRINK_SECONDS:
            able = [m for m in self._members if m.state == "there" or m.grown]
            idle = [m for m in able if not m.calls and not self.holds(m.number)]
            for member in idle[::-1][: len(self._members) - wanted]:
                self._drop(member)

    def give_way(self) -> None:
        """End added actors that are not ready, and add none for a while, so that lost actors find room."""
        self._calm_until = time.monotonic() + CALM_SECONDS
        for member in [m for m in self._members if m.grown and m.state != "there"]:
            self._drop(member)

    def _add(self, grown: bool) -> None:
        number, actor = self._make()
        self._members.append(_Member(number, actor, "loading", grown, self._load(actor)))

    def _drop(self, member: _Member) -> None:
        self._members.remove(member)
        self._waiting.extendleft(reversed(member.calls.values()))
        member.calls.clear()
        ray.kill(member.actor)
        self._removed(member.number)

    def stop(self) -> None:
        """End all actors."""
        for member in list(self._members):
            self._drop(member)

    # -- metrics and messages -----------------------------------------------------------------------------------------

    @property
    def actors(self) -> "list[ActorHandle[Any]]":
        """The handles of all actors of the pool, ready or not."""
        return [m.actor for m in self._members]

    def busy(self) -> str:
        """The actors that have calls or are not ready, with their calls or states, for messages; empty without any."""
        what = {m.number: ", ".join(f"task {c.key}" for c in m.calls.values()) or m.state for m in self._members}
        said = [f"actor {number} ({doing})" for number, doing in what.items() if doing != "there"]
        more = [f"{len(said) - SHOWN} more"] if len(said) > SHOWN else []
        return f"{self.what}: {', '.join([*said[:SHOWN], *more])}" if said else ""

    @property
    def present(self) -> int:
        """The number of actors that are ready."""
        return sum(m.state == "there" for m in self._members)

    @property
    def waiting(self) -> int:
        """The number of calls that wait for an actor."""
        return len(self._waiting)

    @property
    def working(self) -> int:
        """The number of calls in progress."""
        return sum(len(m.calls) for m in self._members)

    def _count_idle(self) -> None:
        """Add up the seconds in which actors are ready and have no calls."""
        now = time.monotonic()
        self.idle_seconds += (now - self._counted) * sum(m.state == "there" and not m.calls for m in self._members)
        self._counted = now


def last_line(error: BaseException) -> str:
    """The last line of an error, which is where Ray gives the reason."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
