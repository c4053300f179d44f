from dataclasses import replace

import numpy as np
import pytest
import torch

from epd_ray.backbones.auto import open_backbone
from epd_ray.config.loading import load_config
from epd_ray.errors import ConfigError, RunDirectoryError, TableError
from epd_ray.runs.distill import distill, rms
from epd_ray.solvers import Solver
from epd_ray.solvers.zoo import Method
from tests.conftest import SIMULATED
from tests.fakes import Quiet
from tests.tiny_models import save_ddpm

HERE = ["cluster.rollout_actors=0", "cluster.learner_actors=0", "prompts.num_train=8", "prompts.validation=6"]


def test_rms_by_hand():
    images = np.zeros((2, 3, 2, 2), np.uint8)
    target = images.copy()
    target[1] = 51
    target[1, 0] = 0
    assert rms(images, target).tolist() == pytest.approx([0, 0.2 * (2 / 3) ** 0.5])


class Counting(Quiet):
    """Counts the steps of each stage: those promised and those done."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, list[int]] = {}

    def stage(self, name: str, total: int) -> None:
        super().stage(name, total)
        self.shown[name] = [total, 0]

    def advance(self, steps: int = 1, /, **numbers: float) -> None:
        self.shown[self.stages[-1]][1] += steps


def test_an_unconditional_model_gets_a_solver_without_any_reward(small_ray, tmp_path):
    model = save_ddpm(tmp_path / "ddpm")
    size = ["solver.intervals=2", "distill.prompts=4", "distill.grid=5", "distill.teacher_steps=2"]
    config = load_config(None, [f"backbone.model={model}", "backbone.dtype=float32", *size, *HERE])
    quiet = Counting()
    lines = distill(config, tmp_path / "out", quiet)
    assert quiet.shown["distilling"] == [2, 2]  # a step for each interval
    solver = Solver.from_pretrained(tmp_path / "out")
    assert solver.meta["backbone"] == "ddpm" and solver.form == "ve" and len(solver.meta["residuals"]) == 2
    assert solver.meta["resolution"] == 16 and "rewards" not in solver.meta
    distances = {line.split("  ")[0]: float(line.split()[-1]) for line in lines[:5]}  # at the same parallel NFE
    assert distances["EPD distilled"] == min(distances.values()) > 0
    assert lines[-1] == f"solver: {tmp_path / 'out'}"
    with pytest.raises(RunDirectoryError, match="--out"):
        distill(config, tmp_path / "out", Quiet())


def test_without_heads_nothing_can_be_learned(build):
    algo = build("solver.intervals=2")
    algo.config.reward_specs.clear()
    with pytest.raises(ConfigError, match="head"):
        algo.training_step()


@pytest.mark.parametrize("without", ["distill.enabled=false", "distill.table=sd3-512-rl"])
def test_what_a_run_would_leave_out_is_checked_and_done(tmp_path, without):
    config = load_config(None, [*SIMULATED, *HERE, "distill.method=gradient", "solver.afs=true", without])
    with pytest.raises(ConfigError, match=r"distill: .*gradient"):
        distill(config, tmp_path / "out", Quiet())


def follows_ve(drift, x, sigmas, *, callback=None):
    raise AssertionError("it is refused before it is drawn with")


VE_ALONE = Method("VE alone", "tests.test_distill_run:follows_ve", forms=("ve",))


def test_a_rival_of_another_form_is_refused_before_stage_one(small_ray, tmp_path):
    rival = "evaluation.baselines=['tests.test_distill_run:VE_ALONE']"
    config = load_config(None, [*SIMULATED, *HERE, "distill={prompts: 4, grid: 5}", rival])
    quiet = Quiet()
    with pytest.raises(ConfigError, match=r"VE_ALONE'.* ve, .* flow"):
        distill(config, tmp_path / "out", quiet)
    assert quiet.stages == ["starting actors"] and not (tmp_path / "out").exists()


def test_simulated_models_need_no_file(small_ray, tmp_path):
    config = load_config(None, [*SIMULATED, *HERE, "distill={enabled: true, prompts: 4, grid: 5}"])
    distill(config, tmp_path / "out", Quiet())
    assert Solver.from_pretrained(tmp_path / "out").table.intervals == 3


@pytest.mark.slow  # it samples with the embedded network
def test_the_embedded_model_gets_every_part(small_ray, tmp_path):
    parts = ["solver.grid=true", "solver.history=1", "solver.guidance=true", "solver.reuse=1"]
    size = ["solver.intervals=3", "distill={prompts: 4, grid: 5, teacher_steps: 2}", "evaluation.baselines=[]"]
    lines = distill(load_config(None, [*HERE, *size, *parts]), tmp_path / "out", Quiet())
    solver = Solver.from_pretrained(tmp_path / "out")
    table = solver.table
    assert len(table.reused) == 1 and table.history is not None
    usual = open_backbone(model=load_config(None, []).backbone.model, device="cpu").sigmas(3)
    assert table.grid is None and torch.equal(solver.sigmas[[0, -1]], usual[[0, -1]])  # the sigmas hold the grid
    assert (solver.sigmas[1:-1] / usual[1:-1] - 1).abs().max() > 0.02
    assert table.guidance is not None and len(set(table.guidance.tolist())) > 1
    took = solver.meta["stage_one"]
    assert took["network_passes"] > 0 and f"stage 1: 4 prompts, {took['network_passes']:,} network passes" in lines[-2]


def test_guidance_of_a_model_without_it_is_refused_before_anything_is_fitted(small_ray, tmp_path):
    config = load_config(None, [*SIMULATED, *HERE, "distill={enabled: true, prompts: 4, grid: 5}", "solver.reuse=1"])
    with pytest.raises(TableError, match=r"a model of family .* has none that could differ"):
        distill(config, tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_keeps_the_intervals_that_stage_one_chose(build):
    algo = build("solver.intervals=3")
    algo.rebase(replace(algo.mean_table(), reuse=torch.tensor([False, False, True])))
    assert algo.mean_table().reused == [2]
    state = algo.export_state()
    again = build("solver.intervals=3")
    assert again.mean_table().reused == []
    again.import_state(state)
    assert again.mean_table().reused == [2]
