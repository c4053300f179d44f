import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from epd_ray.backbones.simulated import SimulatedBackbone
from epd_ray.drawing.sampler import Sampler, alike, finite_pictures
from epd_ray.errors import ModelError
from epd_ray.runs.sample import SampleOptions, sample
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.conditioned import noises
from tests.families import folder, load
from tests.tiny_models import save_sd

PROMPTS = ["red", "blue", "red", "red", "blue"]
SEEDS = [1, 1, 1, 2, 1]  # rows 0 and 2 begin alike, and rows 1 and 4
POSITIONS = torch.linspace(0.1, 0.9, 20).reshape(5, 2, 2)  # each row with a table of its own
SAMPLER = Sampler("epd", 2, "epd", "EPD", SolverTable(POSITIONS, torch.full((5, 2, 2), 0.5)))


class Counting(SimulatedBackbone):
    """Counts the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def drift(self, x: Tensor, sigma: Tensor, conditioning) -> Tensor:
        self.calls.append(len(x))
        return super().drift(x, sigma, conditioning)


def draw(sampler: Sampler, *, shared: bool) -> tuple[Tensor, list[int]]:
    backbone = Counting()
    starts = alike(backbone, PROMPTS, SEEDS, 1.0) if shared else None
    x = sampler.run(backbone, backbone.encode(PROMPTS, 1.0), noises(backbone, SEEDS), starts)
    return x, backbone.calls


@pytest.mark.parametrize("order", [1, 2])
def test_rows_that_begin_alike_are_evaluated_once(order: int) -> None:
    sampler = replace(SAMPLER, order=order)
    (together, calls), (apart, more) = draw(sampler, shared=True), draw(sampler, shared=False)
    assert (calls, more) == ([3, 10, 5, 10], [5, 10, 5, 10])
    assert torch.allclose(together, apart, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(together[0], together[2], atol=1e-3)  # alike at the start, not in their tables


def test_an_analytical_first_step_has_no_start_to_share() -> None:
    (together, calls), (apart, _) = draw(replace(SAMPLER, afs=True), shared=True), draw(
        replace(SAMPLER, afs=True), shared=False
    )  # fmt: skip
    assert calls == [10, 5, 10] and torch.equal(together, apart)


def test_rows_are_alike_in_prompt_and_noise() -> None:
    found = alike(SimulatedBackbone(), PROMPTS, SEEDS, 1.0)
    assert found is not None and (found.rows, found.kinds) == ((0, 1, 3), (0, 1, 0, 2, 1))
    assert len(found.conditioning) == 3
    assert alike(SimulatedBackbone(), ["red", "blue", "red"], [1, 1, 2], 1.0) is None


def test_drawing_with_a_saved_solver_needs_no_ray(tmp_path: Path) -> None:
    """`epd-ray sample` draws in its own process: it starts without the seconds that Ray and RLlib take to import."""
    table = SolverTable(torch.tensor([[0.5]]), torch.ones(1, 1))
    meta = {"backbone": "simulated", "registry": "simulated"}
    Solver(table, torch.tensor([1.0, 0.1]), "flow", meta=meta).save_pretrained(tmp_path / "solver")
    check = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from epd_ray.cli import app\n"
        "done = CliRunner().invoke(app, ['sample', '--solver', 'solver', '--prompt', 'a', '--out', 'a.png'])\n"
        "assert done.exit_code == 0, done.output\n"
        "assert 'ray' not in sys.modules\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("part", "key", "named"), [("vae", "decoder.conv_in.weight", "vae"), ("unet", "conv_in.weight", "network")]
)
def test_what_is_not_finite_is_no_black_picture(part: str, key: str, named: str, tmp_path: Path) -> None:
    model = save_sd(tmp_path / "m")
    file = model / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {key: weights[key] * 1e38}, file, metadata={"format": "pt"})
    options = SampleOptions(model=str(model), resolution=16, device="cpu", dtype="float32")
    with pytest.raises(ModelError, match=rf"its {named} gave values that are not finite in float32.*dtype") as caught:
        sample("sd15-rl", ["red"], 0, tmp_path / "pictures" / "a.png", options)
    assert "\n" not in str(caught.value) and str(model) in str(caught.value)
    assert not (tmp_path / "pictures").exists()


def test_an_overflow_of_the_decoder_is_no_white_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load(folder("sd"))
    latents = noises(backbone, [0])
    plain = backbone.decode(latents)
    assert plain.isfinite().all() and float(plain.min()) >= 0 and float(plain.max()) <= 1
    monkeypatch.setattr(backbone._family, "images", lambda x, _: torch.full((1, 3, 2, 2), torch.inf))
    with pytest.raises(ModelError, match="its vae"):
        finite_pictures(backbone, latents)
