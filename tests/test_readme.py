"""The front page and docs/ keep their word: commands parse, Python runs, the checks use the install line.

A block is looked up by a line of it, so that documents may be reordered and parts of them moved.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from epd_ray.cli import app
from epd_ray.config.loading import load_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INSTALL = 'pip install -e ".[test]" && pytest'
TRAINING = "from epd_ray import RDPOConfig"
SCHEDULER = "from epd_ray import EPDScheduler"
PARALLEL = "from epd_ray import parallelize"
SHOWN = {"train", "sample", "evaluate", "doctor", "fetch", "distill", "tables", "results", "ab", "bench"}


def blocks(language: str) -> list[str]:
    """Of all documents."""
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def block(language: str, line: str) -> str:
    """The one that has this line."""
    (found,) = [text for text in blocks(language) if line in text.splitlines()]
    return found


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    parts = [part.strip() for line in text.splitlines() for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith("epd-ray")]


def test_every_kind_of_command_is_shown():
    assert {c[1] for c in commands()} >= SHOWN


def test_every_python_block_is_run():
    assert len(blocks("python")) == len({block("python", line) for line in (TRAINING, SCHEDULER, PARALLEL)})


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_parses(command):
    node, words = typer.main.get_command(app), command[1:]
    while hasattr(node, "commands"):
        name, *words = words
        node = node.get_command(None, name)
    context = node.make_context(name, words)
    config = context.params.get("config")
    assert config is None or (ROOT / config).is_file()
    if context.params.get("overrides") or config:
        load_config(config and ROOT / config, context.params.get("overrides") or [])


@pytest.mark.parametrize("command", [c for c in commands() if "--suite" in c], ids=" ".join)
def test_suites_are_asked_for_what_there_is(command, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "epd_ray.evaluation.suites.evaluate.evaluate_suite", lambda *request: asked.append(request) or []
    )
    monkeypatch.setattr("epd_ray.actors.beforehand.require_models", lambda settings: None)  # which are only examples
    monkeypatch.chdir(ROOT)
    typer.main.get_command(app)(command[1:], standalone_mode=False)
    assert len(asked) == 1  # the options go together, and every KEY=VALUE is a setting


def test_checks_use_the_readmes_install_line():
    assert INSTALL in (ROOT / "README.md").read_text().splitlines()
    assert INSTALL in (ROOT / ".ci" / "run").read_text().splitlines()


def anchors(text: str) -> set[str]:
    """Of a document's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("home", DOCUMENTS, ids=lambda document: document.name)
def test_pictures_and_links_lead_somewhere(home):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", home.read_text()) if "://" not in link]
    assert links or home.name != "README.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = home.parent / path if path else home
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def python(code, folder):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=600)


@pytest.mark.slow
def test_the_training_example_runs():
    result = python(block("python", TRAINING), ROOT)
    assert result.returncode == 0, result.stderr
    assert "SolverTable" in result.stdout


@pytest.mark.slow
def test_the_examples_that_take_a_solver_home_run_one_after_the_other(tmp_path):
    (tmp_path / "epd_ray").symlink_to(ROOT / "epd_ray")
    pipeline, parallel = block("python", SCHEDULER), block("python", PARALLEL)
    again = 'pipe("a small red circle in the center", guidance_scale=4.5).images[0].save("again.png")\n'
    result = python(f"{pipeline}\n{parallel}\n{again}", tmp_path)
    assert result.returncode == 0, result.stderr
    circle, at_once = (
        np.asarray(Image.open(tmp_path / name, formats=["PNG"]), float) for name in ("circle.png", "again.png")
    )
    assert circle.shape == (64, 64, 3) and circle.std() > 5 and at_once.std() > 5
