"""Tries the documents of a kind in a process of its own, which can be killed when C code hangs."""

import importlib
import logging
import multiprocessing
import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from epd_ray.bench.fuzzing.changes import WAYS, changed
from epd_ray.bench.fuzzing.importer import BAD, DEADLINE, Importer, outcome
from epd_ray.errors import EpdRayError

log = logging.getLogger(__name__)

KINDS = "epd_ray.bench.fuzzing.kinds"
START_SECONDS = 120.0  # for a process to begin, which imports everything and may start a server
KILL_SECONDS = 4 * DEADLINE  # without an outcome, after which the process is killed
SHOWN = 3  # documents of each bad outcome that the log shows


@dataclass
class Tried:
    """The documents of a kind.

    Attributes:
        outcomes: their number by outcome, one of OUTCOMES.
        memory_mb: the growth of the process's largest resident memory, in MiB.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    memory_mb: float = 0.0


def fuzz(count: int, kinds: Sequence[str] = (), module: str = KINDS) -> dict[str, Tried]:
    """Try documents of several kinds, one process after another.

    Args:
        count: the number of documents of each kind, at least 1.
        kinds: the names of the kinds; none stands for all.
        module: the module whose IMPORTERS holds the kinds.

    Raises:
        EpdRayError: hypothesis is not installed, or a kind is not known.
    """
    importers: dict[str, Importer] = importlib.import_module(module).IMPORTERS
    if unknown := sorted({*kinds} - importers.keys()):
        raise EpdRayError(f"kind {unknown[0]!r} is not known, expected of: {', '.join(importers)}")
    context = multiprocessing.get_context("forkserver")  # whose processes begin without threads and connections
    context.set_forkserver_preload([module])
    found = {}
    for kind in kinds or importers:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(module, kind, count, there), daemon=False)
        process.start()
        there.close()
        found[kind] = _watched(kind, here)
        if process.is_alive() and not here.closed:
            process.kill()
        process.join()
    return found


def _watched(kind: str, outcomes: Connection) -> Tried:
    """Count what a process reports; its end before it has reported all is an outcome, too."""
    tried, patience, last = Tried(), START_SECONDS, b""
    try:
        while outcomes.poll(patience):
            patience = KILL_SECONDS
            match outcomes.recv():
                case "begins", bytes(data):
                    last = data
                case "ended", str(ending), str(why):
                    _count(kind, tried, ending, why, last)
                case "memory", float(grown):
                    tried.memory_mb = grown
                    outcomes.close()
                    return tried
        _count(kind, tried, "hung", f"the process was killed after {patience:g} s", last)
    except EOFError:
        _count(kind, tried, "crashed", "the process ended", last)
    return tried


def _count(kind: str, tried: Tried, ending: str, why: str, data: bytes) -> None:
    tried.outcomes[ending] += 1
    if ending in BAD and tried.outcomes[ending] <= SHOWN:
        log.error("%s: %s: %s: %r", kind, ending, why, data[:300])


def _work(module: str, kind: str, count: int, report: Connection) -> None:
    logging.disable(logging.CRITICAL)  # warnings about damaged documents are wanted, and not read here
    importer: Importer = importlib.import_module(module).IMPORTERS[kind]
    with importer.around():
        before = _peak_mb()
        attempt(importer, count, report)
    report.send(("memory", _peak_mb() - before))


def attempt(importer: Importer, count: int, report: Connection) -> None:
    """Try documents of one kind in this process.

    Args:
        importer: the kind.
        count: the number of documents.
        report: receives ("begins", document) before each one, and ("ended", outcome, why) after it.

    Raises:
        EpdRayError: hypothesis is not installed.
    """
    try:
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import strategies as st
    except ImportError as error:
        raise EpdRayError("the package hypothesis is not installed: pip install 'epd-ray[test]'") from error
    numbers = st.lists(st.integers(0, 1000), min_size=4, max_size=4)
    share = st.floats(0, 1)
    changes = st.tuples(st.sampled_from(WAYS), share, share, st.integers(0, 10**4), st.binary(max_size=64))

    @settings(
        max_examples=count, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(numbers, changes)
    def one(numbers: list[int], change: tuple[str, float, float, int, bytes]) -> None:
        whole, value = importer.make(numbers)
        data = changed(importer.name, whole, *change)
        report.send(("begins", data))
        report.send(("ended", *outcome(importer, data, value, whole=data == whole)))

    one()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
