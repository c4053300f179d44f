"""Shows a run's progress on stderr: a live display on a terminal, plain lines elsewhere."""

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

LINE_SHARE = 0.1  # share of a stage's steps after which a line is printed
LINE_SECONDS = 10.0


class Observer(Protocol):
    """Receives a run's progress. One stage runs at a time."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps, which ends the stage before it."""
        ...

    def item(self, name: str) -> None:
        """Say what the steps to come work on, until the next item or stage; numbers of the item before are gone."""
        ...

    def advance(self, steps: int = 1, /, **numbers: float) -> None:
        """Count finished steps and show the latest `numbers` by name ("images_per_s" is shown as images/s)."""
        ...

    def note(self, text: str) -> None:
        """Show a line of text."""
        ...

    def done(self) -> None:
        """End the display; may be called twice."""
        ...


def console_observer() -> Observer:
    """A LiveObserver if stderr is a terminal that can show it, else a LineObserver."""
    console = Console(stderr=True)
    return LiveObserver(console) if sys.stderr.isatty() and not console.is_dumb_terminal else LineObserver(sys.stderr)


class LiveObserver:
    """Shows a row per stage with bar, steps, numbers, elapsed and remaining time, by rich."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[item]}", markup=False),
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
        self._task = self._progress.add_task(name, total=total, item="", numbers="")

    def item(self, name: str) -> None:
        if self._task is None:
            raise RuntimeError("item() before stage()")
        self._numbers = {}
        self._progress.update(self._task, item=name, numbers="")

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
    """Prints a line when a stage begins and ends, and in between after a tenth of its steps or 10 s.

    Args:
        stream: receives the lines; flushed after each of them.
        clock: returns a time in seconds; only differences are used.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._name, self._item, self._total, self._count, self._start = "", "", 0, 0, 0.0
        self._printed_count, self._printed_time = 0, 0.0
        self._numbers: dict[str, float] = {}

    def stage(self, name: str, total: int) -> None:
        self._name, self._item, self._total, self._count, self._numbers = name, "", total, 0, {}
        self._start = self._clock()
        self._print_count()

    def item(self, name: str) -> None:
        self._item, self._numbers = name, {}

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
        parts = [f"{self._name} {self._count}/{self._total}", self._item, _listed(self._numbers)]
        if 0 < self._count < self._total:
            left = (self._printed_time - self._start) / self._count * (self._total - self._count)
            parts.append(f"{duration(left)} left")
        self.note(", ".join(part for part in parts if part))


def duration(seconds: float) -> str:
    """A duration in words, such as "45 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 minute", "1,440 pictures" or "12 network passes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _listed(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_per_', '/').replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
