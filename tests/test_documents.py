"""JSON documents of strangers are refused in one line, and what is accepted is what stands in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from epd_ray.backbones.index import INDEX, read_index
from epd_ray.errors import EpdRayError, ModelError, RunDirectoryError, TableError
from epd_ray.evaluation.records import read_evaluation
from epd_ray.evaluation.suites.directory import Manifest, ResultsDirectory
from epd_ray.runs.saved import read_splits
from epd_ray.solvers import Solver
from epd_ray.solvers.presets import PRESETS
from epd_ray.storage.documents import parse_json
from epd_ray.telemetry.provenance import MADE_BY, Provenance, sign, signed_by


def message(call: Any, *arguments: Any, kind: type[EpdRayError]) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a": 1, "a": 2}', "'a'.*twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"1e999", "1e999"),
        (b"9" * 5000, "4300"),
        (b"[" * 101 + b"]" * 101, "100 levels"),
        (b"[" * 100_000, "deep"),
        (b'"\\ud800"', "surrogates"),
        (b'{"\\ud800": 1}', "surrogates"),
        (b'{"' + b"a" * 10**6 + b'": 1, "' + b"a" * 10**6 + b'": 1}', "twice"),
    ],
    ids=range(13),
)
def test_forged_documents(data: bytes, said: str) -> None:
    with pytest.raises(TableError, match=said):
        parse_json(data, "a.json", TableError, "write it again")
    assert "a.json" in message(parse_json, data, "a.json", TableError, "write it again", kind=TableError)


def test_what_is_written_is_read() -> None:
    value = {"a": [1, 2.5, None, True, "\u00e9\U0001f600"], "b": {"c": 2**70, "d": "9" * 10_000}}
    for data in (json.dumps(value), json.dumps(value).encode(), b"\xef\xbb\xbf" + json.dumps(value).encode()):
        assert parse_json(data, "a.json", TableError, "") == value
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    assert parse_json(json.dumps(deep), "a.json", TableError, "") == deep


FORGED = [
    "[" * 100_000,
    "9" * 5000,
    "[]",
    "null",
    '{"commands": [1]}',
    '{"commands": [], "machine": {}}',
    "\udcff",
    "{",
]


@pytest.mark.parametrize("text", FORGED, ids=range(len(FORGED)))
def test_every_reader_of_json_refuses_a_forged_file(tmp_path: Path, text: str) -> None:
    data = text.encode(errors="surrogateescape")
    for name in ("solver.json", INDEX, MADE_BY, "evaluation.json", "prompts.json", "manifest.json"):
        (tmp_path / name).write_bytes(data)
    assert "solver.json" in message(Solver.from_pretrained, tmp_path, kind=TableError)
    message(read_index, str(tmp_path), None, kind=ModelError)
    for reader in (sign, signed_by):
        assert MADE_BY in message(reader, tmp_path, kind=RunDirectoryError)
    assert (tmp_path / MADE_BY).read_bytes() == data
    message(read_evaluation, tmp_path / "evaluation.json", kind=RunDirectoryError)
    message(read_splits, tmp_path / "prompts.json", kind=RunDirectoryError)
    message(ResultsDirectory(tmp_path).claim, Manifest({}, {}), kind=RunDirectoryError)


def test_a_signed_folder_keeps_its_earlier_commands(tmp_path: Path) -> None:
    here = Provenance.here(("epd-ray earlier",))
    (tmp_path / MADE_BY).write_text(json.dumps(here.record()))
    sign(tmp_path)
    assert signed_by(tmp_path).commands[0] == "epd-ray earlier" and len(signed_by(tmp_path).commands) == 2
    assert "torch" in signed_by(tmp_path).where


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sigmas": "x" * 10**6}, "sigmas"),
        ({"x" * 10**6: 1}, "xxx"),
        ({"format_version": 10**4000}, "13288 bits"),
        ({"order": 10**400}, "order"),
        ({"sigmas": [10**400, 1]}, "sigmas|large"),
        ({"positions": []}, "positions"),
        ({"positions": [[]]}, "positions"),
    ],
    ids=range(7),
)
def test_a_forged_solver_makes_a_short_message(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    record = json.loads(next(iter(PRESETS.values())).read_text())
    (tmp_path / "solver.json").write_text(json.dumps(record | change))
    with pytest.raises(TableError, match=said):
        Solver.from_pretrained(tmp_path)
    message(Solver.from_pretrained, tmp_path, kind=TableError)


def test_an_evaluation_of_one_prompt_has_intervals_that_are_not_known(tmp_path: Path) -> None:
    solver = {"key": "euler", "label": "Euler", "kind": "euler", "intervals": 4, "parallel_nfe": 4, "model_evals": 4}
    unknown = {"mean": 0.5, "low": float("nan"), "high": float("nan")}
    record = {"split": "test", "prompts": 1, "metrics": ["clip"], "solvers": [{**solver, "metrics": {"clip": unknown}}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    found = read_evaluation(tmp_path / "evaluation.json")
    assert found.solvers[0].metrics["clip"].mean == 0.5 and not found.solvers[0].metrics["clip"].known
