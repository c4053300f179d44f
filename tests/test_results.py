"""The document over several commands' results: what stands in it, what it refuses."""

import json
import sys

import pytest

from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.results import read_sections, write_document
from epd_ray.telemetry.machine import machine
from epd_ray.telemetry.provenance import MADE_BY, Provenance, sign, signed_by


@pytest.fixture
def suite(tmp_path, monkeypatch):
    folder = tmp_path / "headline"
    folder.mkdir()
    table = "| method | clip |\n| --- | --- |\n| Euler <b> | 0.9 |"
    (folder / "results.md").write_text(f"# Suite embedded\n\n**Ours is better**\n\n{table}\n")
    monkeypatch.setattr(sys, "argv", ["epd-ray", "evaluate", "--suite", "embedded", "--out", "a b"])
    sign(folder)
    return folder


@pytest.fixture
def bench(tmp_path):
    path = tmp_path / "bench.json"
    made_by = Provenance(("epd-ray bench step --out bench.json",), machine()).record()
    cases = {"step": {"ratio": 2.5, "loop/seconds": 3.0, "ours/seconds": 1.2, "ours/images": 32}}
    path.write_text(json.dumps({"made_by": made_by, "cases": cases}))
    return path


def test_every_figure_stands_under_its_command(suite, bench, tmp_path):
    lines = write_document("Proof", [suite, bench], tmp_path / "out")
    document = (tmp_path / "out" / "results.md").read_text()
    assert [line.split(": ")[0] for line in lines] == ["document", "page"]
    first, second = document.split("## ")[1:]
    assert first.startswith("Suite embedded\n") and "| Euler <b> | 0.9 |" in first
    assert "epd-ray evaluate --suite embedded --out 'a b'" in first
    assert second.startswith("Benchmark step\n") and "epd-ray bench step --out bench.json" in second
    assert "| ratio | 2.5 |" in second and "| ours | 1.2 | 32 |" in second and "| loop | 3 |  |" in second
    assert f"{machine()['cores']} cores of " in second


def test_the_page_has_tables_and_no_foreign_html(suite, bench, tmp_path):
    write_document("Proof", [suite, bench], tmp_path / "out")
    page = (tmp_path / "out" / "results.html").read_text()
    assert page.count("<table>") == 3 and "<td>Euler &lt;b&gt;</td>" in page and "<h2>Benchmark step</h2>" in page


def test_commands_add_up_each_once(suite, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["epd-ray", "evaluate", "again"])
    sign(suite)
    sign(suite)
    assert signed_by(suite).commands == (
        "epd-ray evaluate --suite embedded --out 'a b'", "epd-ray evaluate again",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "holds no results"), ("{", "measure it again"), ("[]", "measure it again"), ("{}", "measure it again")],
)
def test_what_is_no_result_is_refused_and_nothing_written(suite, tmp_path, content, said):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunDirectoryError, match=said):
        write_document("Proof", [suite, path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_suite_without_its_command_is_refused(suite):
    (suite / MADE_BY).unlink()
    with pytest.raises(RunDirectoryError, match="measure it again"):
        read_sections(suite)
