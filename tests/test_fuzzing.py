"""The command that throws damaged documents at importers finds nothing, and would say so if there were something."""

import os
from collections import Counter
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from epd_ray.bench.fuzzing import importer as module
from epd_ray.bench.fuzzing import process
from epd_ray.bench.fuzzing.changes import WAYS, changed
from epd_ray.bench.fuzzing.importer import BAD, Importer, outcome, writes
from epd_ray.bench.fuzzing.kinds import IMPORTERS as KINDS
from epd_ray.bench.fuzzing.process import attempt, fuzz
from epd_ray.errors import EpdRayError, TableError

NEEDS_RAY = {"rewards over HTTP"}


class Reports:
    """Takes the place of the connection to a parent process."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.bad: list[Any] = []

    def send(self, said: tuple[str, Any]) -> None:
        if said[0] == "ended":
            self.found[said[1]] += 1
            self.bad += [said] if said[1] in BAD else []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NEEDS_RAY])
def test_a_few_documents_of_each_kind(kind: str) -> None:
    with KINDS[kind].around():
        attempt(KINDS[kind], 4, reports := Reports())  # type: ignore[arg-type]
    assert reports.found.total() >= 4 and not reports.bad


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_document_of_each_form_is_changed_within_it(kind: str) -> None:
    data, _ = KINDS[kind].make([3, 1, 4, 1])
    forms = [changed(KINDS[kind].name, data, "form", share, 1 - share, i, b"") for i in range(12) for share in (0, 0.9)]
    assert len({*forms} - {data}) > 2
    assert all(changed(KINDS[kind].name, data, how, 0.3, 0.6, 3, b"x") for how in WAYS)


@pytest.mark.slow
def test_many_documents_of_each_kind_in_processes_of_their_own() -> None:
    tried = fuzz(60)
    total = sum((one.outcomes for one in tried.values()), Counter[str]())
    assert tried.keys() == KINDS.keys() and total.total() >= 60 * len(KINDS) and not any(total[name] for name in BAD)
    assert all(one.outcomes["accepted"] >= 12 and one.memory_mb < 500 for one in tried.values())
    assert all(one.outcomes["rejected cleanly"] >= 3 for kind, one in tried.items() if kind != "metrics.jsonl")


# -- how one document ends --------------------------------------------------------------------------------------------


def refuses(path: Path) -> None:
    raise TableError("x" * 10**6)


def leaves_a_file(path: Path) -> None:
    path.with_name("half").touch()
    raise TableError("no")


def hangs(path: Path) -> None:
    while True:
        pass


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def of(read: Any, **rules: Any) -> Importer:
    return Importer(lambda _: (b"", None), read, "a", **rules)


@pytest.mark.parametrize(
    ("importer", "whole", "expected"),
    [
        (of(lambda path: 1), True, "accepted"),
        (of(lambda path: 2), True, "silently wrong"),
        (of(lambda path: 2), False, "accepted"),
        (of(lambda path: 2, sealed=True), False, "silently wrong"),
        (of(lambda path: 2, seen=lambda found: found - 1), True, "accepted"),
        (of(lambda path: 2, holds=lambda found, path: found == 1), False, "silently wrong"),
        (of(lambda path: 2, holds=lambda found, path: path.read_bytes() == b"x"), False, "accepted"),
        (of(lines, write=writes("a", b"\n".join)), False, "accepted"),
        (of(lines, write=writes("a", b"".join)), False, "accepted"),
        (of(lines, write=writes("a", b"y".join)), False, "accepted"),
        (of(lines, write=writes("a", lambda found: b"y")), False, "silently wrong"),
        (of(lambda path: 1 / 0), False, "crashed"),
        (of(refuses), False, "crashed"),
        (of(leaves_a_file), False, "crashed"),
        (of(hangs), False, "hung"),
    ],
)
def test_every_outcome_is_told_apart(
    importer: Importer, whole: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEADLINE", 0.1)
    assert outcome(importer, b"x", 1, whole=whole)[0] == expected


def test_a_valid_document_that_is_refused_is_wrong() -> None:
    def refuse(path: Path) -> None:
        raise TableError("no")

    assert outcome(of(refuse), b"x", 1, whole=True) == ("silently wrong", "a valid document was refused: no")
    assert outcome(of(refuse), b"x", 1, whole=False) == ("rejected cleanly", "")


# -- processes --------------------------------------------------------------------------------------------------------


def ends_the_process(path: Path) -> None:
    os._exit(3)


def hangs_in_c(path: Path) -> None:
    sum(repeat(0))  # never gives the interpreter the time to handle a signal


def takes_memory(path: Path) -> int:
    return len(bytearray(b"x") * (200 << 20))


IMPORTERS = {
    "well": of(lambda path: path.read_bytes()),
    "ends": of(ends_the_process),
    "hangs": of(hangs_in_c),
    "large": of(takes_memory),
}


@pytest.mark.slow
def test_a_process_that_ends_or_hangs_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "KILL_SECONDS", 1.0)
    monkeypatch.setattr(process, "START_SECONDS", 60.0)
    tried = fuzz(3, module="tests.test_fuzzing")
    assert tried["well"].outcomes["accepted"] >= 3 and tried["well"].memory_mb < 50
    assert tried["ends"].outcomes == {"crashed": 1} and tried["hangs"].outcomes == {"hung": 1}
    assert tried["large"].outcomes["accepted"] >= 3 and 150 < tried["large"].memory_mb < 400


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(EpdRayError, match=r"kind 'x' is not known, expected of: configuration, "):
        fuzz(1, ["x"])
