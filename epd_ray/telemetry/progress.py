"""How a run tells of its progress: a live display on a terminal, plain lines elsewhere, always on stderr."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_SHARE = 0.1
LINE_SECONDS = 10.0


class Observer(Protocol):
    """Is told what a run is doing. One stage runs at a time."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins; the one before it is over."""
        ...

    def advance(self, steps: int = 1, /, **numbers: float) -> None:
        """Steps are done; `numbers` are the latest by name ("images_per_s" is shown as images/s)."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        ...

    def done(self) -> None:
        """Nothing more will come; safe to call twice."""
        ...


def console_observer() -> Observer:
    """The observer for a person at stderr, or for a log file in its place."""
    console = Console(stderr=True)
    return LiveObserver(console) if sys.stderr.isatty() and not console.is_dumb_terminal else LineObserver(sys.stderr)


class LiveObserver:
    """One rich display: a row per stage with bar, steps, numbers, time spent and time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", style="green", markup=False),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task: TaskID | None = None
        self._numbers: dict[str, float] = {}

    def stage(self, name: str, total: int) -> None:
        self._end_stage()
        self._progress.start()
        self._numbers = {}
        self._task = self._progress.add_task(name, total=total, numbers="")

    def advance(self, steps: int = 1, /, **numbers: float) -> None:
        if self._task is None:
            raise RuntimeError("advance() before stage()")
        self._numbers |= numbers
        self._progress.update(self._task, advance=steps, numbers=_listed(self._numbers))

    def note(self, text: str) -> None:
        self._progress.console.print(Text(text))

    def done(self) -> None:
        self._end_stage()
        self._progress.stop()

    def _end_stage(self) -> None:
        if self._task is not None:
            self._progress.stop_task(self._task)
            self._task = None


class LineObserver:
    """A line when a stage begins and ends, and in between about every tenth of it or 10 s, whichever comes first.

    Args:
        stream: flushed after each line.
        clock: seconds, from any start.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._name, self._total, self._count, self._start = "", 0, 0, 0.0
        self._printed_count, self._printed_time = 0, 0.0
        self._numbers: dict[str, float] = {}

    def stage(self, name: str, total: int) -> None:
        self._name, self._total, self._count, self._numbers = name, total, 0, {}
        self._start = self._clock()
        self._print_count()

    def advance(self, steps: int = 1, /, **numbers: float) -> None:
        self._count += steps
        self._numbers |= numbers
        news = self._count - self._printed_count
        waited = self._clock() - self._printed_time
        if self._count >= self._total or news >= LINE_SHARE * self._total or waited >= LINE_SECONDS:
            self._print_count()

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def done(self) -> None:
        self._stream.flush()

    def _print_count(self) -> None:
        self._printed_count, self._printed_time = self._count, self._clock()
        parts = [f"{self._name} {self._count}/{self._total}", _listed(self._numbers)]
        if 0 < self._count < self._total:
            left = (self._printed_time - self._start) / self._count * (self._total - self._count)
            parts.append(f"{duration(left)} left")
        self.note(", ".join(part for part in parts if part))


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _listed(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_per_', '/').replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
