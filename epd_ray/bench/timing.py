"""Seconds of calls. Ways to do the same work are timed in turns, so that a slow moment of the machine hits them all."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from tqdm import tqdm

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Timed(Generic[Answer]):
    """The answer of a call, and the seconds that the call took."""

    seconds: float
    answer: Answer


def timed(call: Callable[[], Answer]) -> Timed[Answer]:
    """Call once and measure the seconds, the work that the call leaves to the GPU included."""
    start = _now()
    answer = call()
    return Timed(_now() - start, answer)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in each repeat. All ways run in every repeat, after a first round that is not counted.

    Args:
        ways: name -> the call that is measured.
        repeats: number of counted rounds, odd and at least 3.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turns = tqdm([(repeat, name) for repeat in range(repeats + 1) for name in ways], leave=False)
    for repeat, name in turns:
        turns.set_description(name)
        taken = timed(ways[name]).seconds
        if repeat:
            seconds[name].append(taken)
    return seconds


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median of the seconds of each way, measured with `interleaved`."""
    return {name: statistics.median(values) for name, values in interleaved(ways, repeats).items()}
