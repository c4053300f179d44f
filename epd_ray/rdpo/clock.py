"""The seconds that the phases of an iteration take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Starts with the iteration and measures the phases that are named."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside as `time/<name>`."""
        start = time.perf_counter()
        yield
        self._seconds[f"time/{name}"] = time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds by phase, and `time/iteration` since the clock was made."""
        return {**self._seconds, "time/iteration": time.perf_counter() - self._start}
