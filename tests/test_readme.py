"""The front page keeps its word: its commands parse, its Python runs, the checks use its install line."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from epd_ray.cli import app
from epd_ray.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    parts = [part.strip() for line in text.splitlines() for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith("epd-ray")]


def test_readme_has_commands():
    assert {c[1] for c in commands()} >= {"train", "sample", "evaluate", "doctor"}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_parses(command):
    group = typer.main.get_command(app)
    subcommand = group.get_command(None, command[1])
    context = subcommand.make_context(command[1], command[2:])
    if command[1] == "train" and context.params["overrides"]:
        load_config(None, context.params["overrides"])


def test_checks_use_the_readmes_install_line():
    install = 'pip install -e ".[test]" && pytest'
    assert install in README
    script = (ROOT / ".ci" / "run").read_text()
    assert f"\n{install}\n" in script


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.slow
def test_python_example_runs():
    (example,) = blocks("python")
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "SolverTable" in result.stdout
