import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from epd_ray.errors import TableError
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.presets import NAMES, PRESETS

DATA = Path(__file__).parent / "data"
TABLES: dict[str, Any] = json.loads((DATA / "official_tables.json").read_text())
GOLDEN_SD15: dict[str, Any] = json.loads((DATA / "golden_sd15_schedule.json").read_text())
RELEASED = {name: TABLES[name.replace("-rl", "-best")] for name in NAMES}
FAMILIES = {"ldm": "sd", "sd3": "sd3", "flux": "flux"}
HUB_IDS = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
}


def schedule(record: dict[str, Any]) -> list[float]:
    """The reference's sigmas [N+1]: SD1.5 from its betas in numpy, flow models from diffusers' own scheduler."""
    count = record["intervals"] + 1
    if record["backend"] == "ldm":
        betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
        log_alpha = 0.5 * np.log(np.cumprod(1 - betas))
        steps = np.linspace(1.0, 0.001, count) * 1000 - 1
        return [float(s) for s in np.sqrt(np.expm1(-2 * np.interp(steps, np.arange(1000), log_alpha)))]
    flux = record["backend"] == "flux"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=flux)
    scheduler.set_timesteps(count, mu=record["backend_config"]["flowmatch_mu"] if flux else None)
    sigmas: list[float] = scheduler.sigmas.double().tolist()
    assert sigmas.pop() == 0
    return sigmas


def test_every_trained_table_is_a_preset() -> None:
    assert sorted(NAMES) == sorted(name.replace("-best", "-rl") for name in TABLES if not name.endswith("-start"))
    assert sorted(PRESETS.values()) == sorted(next(iter(PRESETS.values())).parent.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_the_released_tables(name: str) -> None:
    solver, record = Solver.from_pretrained(name), RELEASED[name]
    for values, key in ((solver.table.positions, "positions"), (solver.table.weights, "weights")):
        torch.testing.assert_close(values, torch.tensor(record[key], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(solver.sigmas, torch.tensor(schedule(record), dtype=torch.float64), rtol=0, atol=1e-12)
    assert (solver.table.scale_dir, solver.table.scale_time) == (None, None)
    assert record["scale_dir_range"] == record["scale_time_range"] == 0
    assert (solver.form, solver.afs, solver.order) == ("ve" if record["backend"] == "ldm" else "flow", False, 1)
    assert solver.parallel_nfe == (16 if name == "flux-rl" else 20)


@pytest.mark.parametrize("name", NAMES)
def test_presets_say_what_they_are_for(name: str) -> None:
    meta, record = Solver.from_pretrained(name).meta, RELEASED[name]
    family, config = FAMILIES[record["backend"]], record["backend_config"]
    assert meta["source_sha256"] == record["source_sha256"]
    assert meta["source"] == {"repository": "https://github.com/BeierZhu/EPD", "file": f"exps/{record['source_file']}"}
    assert (meta["backbone"], meta["model_id"]) == (family, HUB_IDS[family])
    assert config.get("model_name_or_path", HUB_IDS[family]) == HUB_IDS[family]
    # The SD1.5 files carry a resolution that their code does not use; the reference's page says 512 x 512.
    assert meta["resolution"] == (512 if family == "sd" else config["resolution"])
    assert meta["guidance_scale"] == record["guidance_scale"]
    schedules = {"sd": {"rho": 1.0}, "sd3": {"shift": 3.0}, "flux": {"mu": config.get("flowmatch_mu")}}
    assert meta["schedule"] == {"kind": record["schedule"], **schedules[family]}
    facts = {"prediction_type": "epsilon" if family == "sd" else "flow_prediction", "num_train_timesteps": 1000}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    assert meta["scheduler"] == facts | (betas if family == "sd" else {})
    assert "2507.14797" in str(meta["citation"]) and "2512.22796" in str(meta["citation"])


def test_schedules_against_known_values() -> None:
    golden = next(case["sigmas"] for case in GOLDEN_SD15["schedules"] if case["num_sigmas"] == 11)
    assert Solver.from_pretrained("sd15-rl").sigmas.tolist() == pytest.approx(golden, abs=1e-6)  # it is float32
    sd3 = Solver.from_pretrained("sd3-512-rl").sigmas
    assert sd3[[0, 1, 9, 10]].tolist() == pytest.approx([1, 0.96440, 0.25559, 0.008929], abs=5e-6)
    assert Solver.from_pretrained("flux-rl").sigmas[[0, -1]].tolist() == pytest.approx([1, 0.00315], abs=5e-6)


def test_a_directory_comes_before_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = SolverTable(torch.tensor([[0.5]]), torch.tensor([[1.0]]))
    file = Solver(table, torch.tensor([1.0, 0.5])).save_pretrained("flux-rl")
    assert Solver.from_pretrained("flux-rl").parallel_nfe == 2
    assert Solver.from_pretrained(file).parallel_nfe == 2
    assert Solver.from_pretrained("sd15-rl").parallel_nfe == 20


def test_misspelt_presets() -> None:
    with pytest.raises(TableError, match=r"'sd3-1024-r1'.*'sd3-1024-rl'"):
        Solver.from_pretrained("sd3-1024-r1")
    with pytest.raises(TableError, match=r"'nothing'.*flux-rl, .*sd3-512-rl"):
        Solver.from_pretrained("nothing")


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_saved_as_they_are(name: str, tmp_path: Path) -> None:
    assert Solver.from_pretrained(name).save_pretrained(tmp_path).read_text() == PRESETS[name].read_text()
