"""Waits for the answer of an actor that say who is waited for, and that end."""

import logging
import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray
from ray.actor import ActorHandle

log = logging.getLogger(__name__)

SILENT_SECONDS = 30.0  # without an answer before the first warning; each further warning comes after twice as many
FIRST = 4  # the first answer of a process may take this many times as long, because it loads or compiles a model


class Silence:
    """Warns of a wait after SILENT_SECONDS, and again each time it has become twice as long."""

    def __init__(self) -> None:
        self.next = SILENT_SECONDS

    def count(self, seconds: float, who: Callable[[], str]) -> None:
        """Take note that there was no answer for so many seconds; 0 begins anew. No warning names an empty `who`."""
        if not seconds:
            self.next = SILENT_SECONDS
        elif seconds >= self.next:
            self.next *= 2
            if said := who():
                log.warning("waiting %.0f s for %s", seconds, said)


class Watch:
    """Surrounds a call that blocks until an actor answers, and ends the process of an actor that does not answer.

    The blocked call then fails as for an actor whose process died.

    Args:
        who: the actor and its work in messages, such as "the learner (update)".
        actor: the actor; None where nothing is to be ended.
        timeout_s: the seconds after which the process of the actor is ended; None for no bound.
        restarts: whether the actor gets another process then.
    """

    def __init__(
        self, who: str, actor: ActorHandle[Any] | None, timeout_s: float | None, *, restarts: bool = True
    ) -> None:
        self._who, self._actor, self._restarts = who, actor, restarts
        self._limit = math.inf if timeout_s is None or actor is None else timeout_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._wait, name=f"waiting for {who}", daemon=True)
        self.late = False
        """Whether the process was ended because there was no answer in time."""

    def _wait(self) -> None:
        begin, silence = time.monotonic(), Silence()
        while not self._done.wait(min(silence.next, self._limit) - (time.monotonic() - begin)):
            seconds = time.monotonic() - begin
            silence.count(seconds, lambda: self._who)
            if seconds >= self._limit:
                log.warning("%s has not answered for %.0f s: its process is ended", self._who, seconds)
                self.late = True
                ray.kill(self._actor, no_restart=not self._restarts)
                begin, silence = time.monotonic(), Silence()
                self._limit *= FIRST  # the next process loads the model before it answers

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
