"""Seconds of several ways to do the same, side by side, so that a slow moment of the machine hits all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm


def now() -> float:
    """Seconds, after the GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = now()
    call()
    return now() - start


def interleaved(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, one after the other in every repeat; a first round warms up and does not count.

    Args:
        ways: name -> what is measured.
        repeats: odd, at least 3.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turns = tqdm([(repeat, name) for repeat in range(repeats + 1) for name in ways], leave=False)
    for repeat, name in turns:
        turns.set_description(name)
        taken = timed(ways[name])
        if repeat:
            seconds[name].append(taken)
    return seconds


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median of each way's seconds (see `interleaved`)."""
    return {name: statistics.median(values) for name, values in interleaved(ways, repeats).items()}
