"""The command that throws damaged documents at the importers finds nothing, and would say so if it did."""

from collections import Counter
from pathlib import Path

import pytest

from epd_ray.bench import fuzzing
from epd_ray.bench.fuzzing import BAD, IMPORTERS, Importer, _outcome
from epd_ray.errors import TableError


def test_a_few_documents_of_each_kind() -> None:
    found = fuzzing.fuzz(8)
    assert found.keys() == IMPORTERS.keys() and all(outcomes.total() >= 8 for outcomes in found.values())
    assert not [kind for kind, outcomes in found.items() if any(outcomes[name] for name in BAD)]


@pytest.mark.slow
def test_many_documents_of_each_kind() -> None:
    total: Counter[str] = sum(fuzzing.fuzz(100).values(), Counter())
    assert total.total() >= 1300 and not any(total[name] for name in BAD)
    assert total["accepted"] and total["rejected cleanly"]


def refuses(path: Path) -> None:
    raise TableError("x" * 10**6)


def writes(path: Path) -> None:
    path.with_name("half").touch()
    raise TableError("no")


def hangs(path: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "value", "outcome"),
    [
        (lambda path: 1, 1, "accepted"),
        (lambda path: 2, 1, "silently wrong"),
        (lambda path: 1 / 0, None, "crashed"),
        (refuses, None, "crashed"),
        (writes, None, "crashed"),
        (hangs, None, "hung"),
    ],
)
def test_every_outcome_is_told_apart(
    read: object, value: object, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "DEADLINE", 0.1)
    assert _outcome(Importer(lambda _: (b"", None), read, "a"), b"x", value)[0] == outcome  # type: ignore[arg-type]


def test_a_valid_document_that_is_refused_is_wrong() -> None:
    def refuse(path: Path) -> None:
        raise TableError("no")

    assert _outcome(Importer(lambda _: (b"", 1), refuse, "a"), b"x", 1)[0] == "silently wrong"
