import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from epd_ray.cli.tables import app
from epd_ray.errors import TableError
from epd_ray.runs.presets import list_presets
from epd_ray.runs.tables import convert, import_reference, load_solver, show_solver
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.presets import NAMES, read_preset
from tests.test_reference import SD3, Predictor, dump


def printed(content: RenderableType, width: int = 120) -> str:
    page = io.StringIO()
    Console(file=page, width=width).print(content)
    return page.getvalue()


def test_list_has_every_preset_with_its_costs() -> None:
    rows = [line.split() for line in printed(list_presets(), width=80).splitlines()]
    assert {row[0] for row in rows} >= set(NAMES)
    assert ["flux-rl", "flux", "8", "2", "16", "24", "24", "1024", "3.5"] in rows
    assert ["sd15-rl", "sd", "10", "2", "20", "30", "60", "512", "7.5"] in rows


@pytest.mark.parametrize("width", [80, 120])
def test_show_has_every_number(width: int) -> None:
    solver, text = Solver.from_pretrained("sd3-512-rl"), printed(show_solver("sd3-512-rl"), width)
    for row in (*solver.table.positions.tolist(), *solver.table.weights.tolist()):
        assert " ".join(f"{value:.4f}" for value in row) in text
    assert "1 to 0.9644" in text and "20 evaluations" in text and "stabilityai/stable-diffusion-3-medium" in text


def test_show_reads_directories_files_and_the_reference(tmp_path: Path) -> None:
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    solver = Solver(SolverTable(half, 2 * half, 2 * half), torch.tensor([3.0, 2.0, 1.0]), "ve", True, 2)
    file = solver.save_pretrained(tmp_path / "mine")
    for source in (tmp_path / "mine", str(file)):
        text = printed(show_solver(source))
        assert "direction scales" in text and "analytical" in text and "order 2" in text
        assert "time scales" not in text
    pickled = dump(tmp_path / "theirs.pkl", Predictor(3, 2, **SD3))
    assert "owner/sd3" in printed(show_solver(pickled))


def test_import_and_convert(tmp_path: Path) -> None:
    pickled = dump(tmp_path / "theirs.pkl", Predictor(3, 2, **SD3))
    read = load_solver(pickled)
    for step, write in (("imported", import_reference), ("converted", convert)):
        path = write(pickled, tmp_path / step)
        again = Solver.from_pretrained(tmp_path / step)
        assert path == tmp_path / step / "solver.json"
        assert torch.equal(again.table.weights, read.table.weights) and torch.equal(again.sigmas, read.sigmas)
        assert again.meta == read.meta
    assert Solver.from_pretrained(convert("flux-rl", tmp_path / "flux").parent).parallel_nfe == 16


def test_refusals(tmp_path: Path) -> None:
    convert("flux-rl", tmp_path / "flux")
    with pytest.raises(TableError, match="is not empty"):
        convert("sd15-rl", tmp_path / "flux")
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="is a file, expected a directory"):
        convert("sd15-rl", tmp_path / "file")
    with pytest.raises(TableError, match=r"file/x .*--out"):
        convert("sd15-rl", tmp_path / "file" / "x")
    with pytest.raises(TableError, match=r"'sd15-rl' is no \.pkl file"):
        import_reference("sd15-rl", tmp_path / "new")
    with pytest.raises(TableError, match="did you mean 'sd15-rl'"):
        show_solver("sd15-r1")
    assert not (tmp_path / "new").exists()


def test_the_command_prints_both() -> None:
    for command, said in ((["list"], "sd3-1024-rl"), (["show", "flux-rl"], "16 evaluations that wait")):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0 and said in result.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_read_as_its_solver_is(name: str) -> None:
    solver, preset = Solver.from_pretrained(name), read_preset(name)
    assert (preset.intervals, preset.points) == (solver.table.intervals, solver.table.points)
    assert preset.cost == solver.cost and preset.meta == solver.meta


def test_the_list_needs_no_torch() -> None:
    """Importing torch alone takes longer than everything else that this command does."""
    check = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from epd_ray.cli.tables import app\n"
        "assert 'flux-rl' in CliRunner().invoke(app, ['list']).stdout\n"
        "assert not {'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)\n"
        "import epd_ray.runs.tables\n"
        "assert not {'diffusers', 'transformers', 'ray', 'huggingface_hub', 'pandas', 'pyarrow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
