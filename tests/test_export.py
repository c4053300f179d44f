"""Solvers in the files of other tools, each read as that tool reads it.

ComfyUI is not here: its sampler interface is written out by hand, after its public code.
"""

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps
from torch import Tensor
from typer.testing import CliRunner

from epd_ray.cli.tables import app
from epd_ray.deploy.export import export, fields
from epd_ray.deploy.formats import ENDINGS, ExportFormat
from epd_ray.solvers import Solver, SolverTable, heun_table
from epd_ray.solvers.conditioned import ConditionedDrift
from epd_ray.solvers.presets import NAMES
from epd_ray.types import Form
from tests.test_solvers import curved, latents, random_table
from tests.test_whole_table import Guided, prompts

GRIDS = {"flow": [1.0, 0.8, 0.45, 0.1], "ve": [14.6146, 4.0, 1.2, 0.03]}
N, K = 3, 2
HISTORY = torch.tensor([[0.0, 0.0], [0.3, 0.0], [-0.2, 0.1]], dtype=torch.float64)
EULER = SolverTable(torch.zeros(N, 1).double(), torch.ones(N, 1).double())
BOUNDED = random_table(N, K, seed=3)
TABLES = {
    "heun": heun_table(N),
    "scales": SolverTable(BOUNDED.positions, BOUNDED.weights, BOUNDED.scale_dir, 0.9 / BOUNDED.scale_time),  # type: ignore[operator]
    "history": SolverTable(BOUNDED.positions, BOUNDED.weights, history=HISTORY),
}


def solver(form: Form | None = "flow", table: SolverTable = EULER, **options: Any) -> Solver:
    return Solver(table, torch.tensor(GRIDS[form or "flow"], dtype=torch.float64), form, **options)


def guided_solver(reuse: list[bool], guidance: list[float] | None = None, **meta: Any) -> Solver:
    scales = None if guidance is None else torch.tensor(guidance).double()
    table = SolverTable(BOUNDED.positions, BOUNDED.weights, guidance=scales, reuse=torch.tensor(reuse))
    return solver(table=table, meta=meta)


class Sampling:
    """ComfyUI's conventions of a model: how it adds noise, and what it does at the end."""

    def __init__(self, form: Form) -> None:
        self.flow, self.sigma_max = form == "flow", torch.tensor(1.0 if form == "flow" else 14.6146)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool) -> Tensor:
        if self.flow:
            return sigma * noise + (1 - sigma) * latent
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - sigma) if self.flow else latent


class KSampler:
    def __init__(self, sampler_function: Any, extra_options: dict[str, Any]) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        return True

    def sample(self, guider, sigmas, extra_args, callback, noise, latent, denoise_mask=None):
        def model(x, sigma, denoise_mask, model_options=None, seed=None):
            return guider(x, sigma, model_options=model_options or {}, seed=seed)

        extra_args["denoise_mask"] = denoise_mask
        sampling = guider.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent, self.max_denoise(guider, sigmas))
        told = dict(extra_args=extra_args, callback=callback, disable=True)
        x = self.sampler_function(model, x, sigmas, **told, **self.extra_options)
        return sampling.inverse_noise_scaling(sigmas[-1], x)


class Guider:
    """A guider whose model has this drift, as noise or as velocity: in both cases D = x - sigma * drift."""

    def __init__(self, form: Form, drift: Any = curved) -> None:
        self.inner_model, self.drift = SimpleNamespace(model_sampling=Sampling(form)), drift
        self.calls: list[int] = []

    def __call__(self, x, sigma, model_options, seed):
        self.calls.append(len(x))
        assert sigma.shape == x.shape[:1]
        return x - sigma.reshape(-1, *[1] * (x.ndim - 1)) * self.drift(x, sigma)


class CFGGuider:
    """A guider with classifier-free guidance of a model, whose prompts are numbers [B]."""

    def __init__(self, model: Guided, positive: Tensor, negative: Tensor | None, cfg: float) -> None:
        self.inner_model = SimpleNamespace(model_sampling=Sampling("flow"), network=model.network)
        self.positive, self.negative, self.cfg = positive, negative, cfg

    def __call__(self, x, sigma, model_options, seed):
        one = self.cfg == 1 and not model_options.get("disable_cfg1_optimization", False)
        conds = [self.positive, None if one else self.negative]
        told = dict(conds=conds, input=x, sigma=sigma, model=self.inner_model, model_options=model_options)
        if "sampler_calc_cond_batch_function" in model_options:
            text, empty = model_options["sampler_calc_cond_batch_function"](told)
        else:
            text, empty = calc_cond_batch(self.inner_model, conds, x, sigma, model_options)
        return empty + (text - empty) * self.cfg


def calc_cond_batch(model, conds, x, sigma, model_options):
    def denoised(cond: Tensor | None) -> Tensor:
        if cond is None:
            return torch.zeros_like(x)
        words = cond.repeat(len(x) // len(cond))  # as ComfyUI fits conditions to a batch
        return x - sigma[:, None] * model.network(x, sigma, (words,))

    return [denoised(cond) for cond in conds]


@pytest.fixture(autouse=True)
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    package, samplers = ModuleType("comfy"), ModuleType("comfy.samplers")
    samplers.KSAMPLER, samplers.calc_cond_batch, package.samplers = KSampler, calc_cond_batch, samplers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)


@pytest.fixture
def node(tmp_path: Path) -> Any:
    def made(found: Solver, points_at_once: bool = True) -> tuple[Any, Tensor]:
        path = export(found, "mine", "comfyui", tmp_path / f"node{len(list(tmp_path.iterdir()))}.py").path
        space = runpy.run_path(str(path))
        (kind,) = space["NODE_CLASS_MAPPINGS"].values()
        assert kind.RETURN_TYPES == ("SAMPLER", "SIGMAS") and set(kind.INPUT_TYPES()["required"]) == {"points_at_once"}
        return getattr(kind(), kind.FUNCTION)(points_at_once)

    return made


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize(
    ("table", "options", "at_once"),
    [
        ("heun", {}, True),
        ("scales", {}, False),
        ("scales", {"afs": True, "order": 3}, True),
        ("heun", {"afs": True}, True),
        ("history", {"order": 2}, True),
    ],
)
def test_the_node_draws_what_the_solver_draws(form, table, options, at_once, node) -> None:
    ours, guider, seen = solver(form, TABLES[table], **options), Guider(form), []
    sampler, sigmas = node(ours, at_once)
    noise = latents(2, 3, 4, 4)
    found = sampler.sample(guider, sigmas, {"seed": 1}, seen.append, noise, torch.zeros_like(noise))
    expected = ours.solve(curved, noise * ours.sigmas[0])
    close(found, expected)
    assert sum(guider.calls) == 2 * ours.model_evals and (len(guider.calls) == ours.parallel_nfe) == at_once
    assert [step["i"] for step in seen] == [0, 1, 2, 3] and len(sigmas) - 1 == 4
    assert not torch.allclose(expected, solver(form).solve(curved, noise * ours.sigmas[0]), rtol=1e-3)


@pytest.mark.parametrize(
    ("guidance", "reuse"),
    [([5.0, 1.0, 2.0], [False] * 3), (None, [False, True, False]), ([5.0, 3.0, 2.0], [False, False, True])],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_the_node_guides_each_interval(guidance, reuse, at_once, node) -> None:
    found, model, own = guided_solver(reuse, guidance, classifier_free=True), Guided(), Guided()
    sampler, sigmas = node(found, at_once)
    empty, text = prompts().tensors[0].chunk(2)
    noise = latents(2, 3)
    drawn = sampler.sample(CFGGuider(model, text, empty, 3.0), sigmas, {}, None, noise, torch.zeros_like(noise))
    close(drawn, found.solve(ConditionedDrift(own, prompts()), noise))  # type: ignore[arg-type]
    assert model.rows == own.rows < 2 * 2 * found.model_evals
    if guidance is not None:  # the workflow's cfg plays no part
        again = sampler.sample(CFGGuider(model, text, empty, 1.0), sigmas, {}, None, noise, torch.zeros_like(noise))
        close(again, drawn)


def test_what_the_node_cannot_draw_it_refuses(node) -> None:
    sampler, sigmas = node(solver())
    x = latents(2, 3)
    call = ({}, None, x, 0 * x)
    for wrong in (sigmas[:-1], sigmas[1:], sigmas * 0.99):
        with pytest.raises(ValueError, match="connect its output SIGMAS"):
            sampler.sample(Guider("flow"), wrong, *call)
    with pytest.raises(ValueError, match="repaint"):
        sampler.sample(Guider("flow"), sigmas, *call, denoise_mask=x)
    with pytest.raises(ValueError, match="is for a flow model, but the workflow has a model that predicts noise"):
        sampler.sample(Guider("ve"), sigmas, *call)
    guided, sigmas = node(guided_solver([False] * 3, [5.0, 1.0, 2.0], classifier_free=True))
    with pytest.raises(ValueError, match="has its own"):
        guided.sample(Guider("flow"), sigmas, *call)
    with pytest.raises(ValueError, match="needs a negative prompt"):
        guided.sample(CFGGuider(Guided(), x[:, 0], None, 1.0), sigmas, *call)
    with pytest.raises(ValueError, match="another node of the workflow does too"):
        others = {"model_options": {"sampler_calc_cond_batch_function": print}}
        guided.sample(CFGGuider(Guided(), x[:, 0], x[:, 0], 1.0), sigmas, others, None, x, 0 * x)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_node_of_its_own(name: str, tmp_path: Path) -> None:
    path = export(Solver.from_pretrained(name), name, "comfyui", tmp_path / "a.py").path
    space = runpy.run_path(str(path))
    assert list(space["NODE_CLASS_MAPPINGS"]) == [f"EPDSolver_{name.replace('-', '_')}"]
    assert "guidance scale" in space["LearnedSolver"].DESCRIPTION and max(map(len, path.read_text().splitlines())) < 260


def test_no_value_of_a_solver_becomes_code(tmp_path: Path) -> None:
    evil = '"""\nraise SystemExit\n"""\\'
    found = solver(meta={"model_id": evil, "resolution": evil, "guidance_scale": evil})
    for to in ("comfyui", "diffusers"):
        text = export(found, evil, to, tmp_path / f"{to}.py").path.read_text()
        assert not [node for node in ast.walk(ast.parse(text)) if getattr(node, "id", None) == "SystemExit"]
        assert "raise SystemExit" in (ast.get_docstring(ast.parse(text)) or "")


def test_sigmas_are_read_by_the_nodes_for_sigmas(tmp_path: Path) -> None:
    small = Solver(EULER, torch.tensor([1.0, 0.5, 0.01, 1.25e-6], dtype=torch.float64), "flow")
    for i, found in enumerate((small, *map(Solver.from_pretrained, NAMES))):
        text = export(found, "x", "sigmas", tmp_path / f"{i}.txt").path.read_text()
        manual = [float(s) for s in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]  # as ComfyUI's ManualSigmas
        custom = [float(s) for s in text.split(", ")]  # as CustomSigmas of KJNodes
        assert manual == custom and torch.equal(torch.tensor(custom), found.sigmas.float())


SHIFTED = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "use_karras_sigmas": True}


@pytest.mark.parametrize("settings", [SHIFTED, DYNAMIC], ids=["shift", "dynamic"])
def test_the_flow_scheduler_of_diffusers_has_the_tables_levels(settings: dict[str, Any], tmp_path: Path) -> None:
    found = Solver.from_pretrained("sd3-512-rl")
    space = runpy.run_path(str(export(found, "x", "diffusers", tmp_path / "x.py").path))
    own = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler = space["with_levels"](own)
    timesteps, steps = retrieve_timesteps(scheduler, 28, "cpu", sigmas=space["SIGMAS"], mu=1.15)
    levels = found.sigmas.float()
    torch.testing.assert_close(scheduler.sigmas, torch.cat([levels, torch.zeros(1)]), rtol=1e-6, atol=0)
    torch.testing.assert_close(timesteps, 1000 * levels, rtol=1e-6, atol=0)
    assert steps == len(levels)
    own.set_timesteps(sigmas=space["SIGMAS"], mu=1.15)  # the pipeline's own scheduler would shift them again
    assert not torch.allclose(own.sigmas[:-1], levels, rtol=1e-2)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_the_euler_scheduler_of_diffusers_has_the_tables_levels(kind: type, tmp_path: Path) -> None:
    found = Solver.from_pretrained("sd15-rl")
    betas = {k: v for k, v in found.meta["scheduler"].items() if k.startswith("beta")}  # type: ignore[union-attr]
    karras = {"use_karras_sigmas": True} if kind is EulerDiscreteScheduler else {}
    space = runpy.run_path(str(export(found, "x", "diffusers", tmp_path / "x.py").path))
    scheduler = space["with_levels"](kind(**betas, **karras, timestep_spacing="leading", steps_offset=1))
    _, steps = retrieve_timesteps(scheduler, 50, "cpu", sigmas=space["SIGMAS"])
    torch.testing.assert_close(scheduler.sigmas, found.sigmas.float(), rtol=1e-6, atol=0)
    assert steps == 10 and float(scheduler.init_noise_sigma) == pytest.approx(14.6146, rel=1e-5)


def test_json_and_numpy_hold_the_whole_solver(tmp_path: Path) -> None:
    scales = TABLES["scales"]
    table = SolverTable(scales.positions, scales.weights, scale_time=scales.scale_time, history=HISTORY)
    ours = solver("ve", table, order=2, meta={"model_id": "owner/model"})
    record = json.loads(export(ours, "x", "json", tmp_path / "x.json").path.read_text())
    assert record == fields(ours)
    assert record["guidance"] is None and record["scale_dir"] == [[1.0] * K] * N and record["model_evals"] == 9
    with np.load(export(ours, "x", "numpy", tmp_path / "x.npz").path, allow_pickle=False) as arrays:
        assert set(arrays) == {name for name, value in record.items() if value is not None}
        assert json.loads(str(arrays["meta"])) == record["meta"] and str(arrays["form"]) == "ve"
        for name in ("sigmas", "positions", "weights", "scale_dir", "scale_time", "history"):
            np.testing.assert_array_equal(arrays[name], np.array(record[name]))


def test_what_levels_alone_lose_is_said(tmp_path: Path) -> None:
    said = export(solver(), "x", "sigmas", tmp_path / "euler.txt").lost
    assert said is None
    whole = guided_solver([False, False, True], [5.0, 3.0, 2.0], classifier_free=True)
    for to in get_args(ExportFormat):
        lost = export(whole, "x", to, tmp_path / f"whole{ENDINGS[to]}").lost
        if to in ("json", "numpy", "comfyui"):
            assert lost is None
        else:
            assert lost is not None and "2 points of each interval" in lost and "guidance scale, reused" in lost
    both = solver("ve", TABLES["history"], afs=True, order=2)
    lost = export(both, "x", "sigmas", tmp_path / "both.txt").lost
    assert lost is not None and all(part in lost for part in ("history", "multistep slope", "analytical first step"))


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["export", *words])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_refusals_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("mine")
    (tmp_path / "no.json").write_text("{}")
    solver(None).save_pretrained("formless")
    guided_solver([False] * 3, [5.0, 1.0, 2.0]).save_pretrained("embedded")
    solver("ve", meta={"prompted": False}).save_pretrained("silent")
    before = sorted(tmp_path.rglob("*"))
    assert "there.txt exists" in refused("flux-rl", "--to", "sigmas", "-o", "there.txt")
    assert "none is no folder" in refused("flux-rl", "--to", "json", "-o", "none/x.json")
    assert "there.txt is no folder" in refused("flux-rl", "--to", "json", "-o", "there.txt/x.json")
    assert "format_version" in refused("no.json", "--to", "numpy")
    assert "is not valid JSON" in refused("there.txt", "--to", "numpy")
    assert "did you mean 'flux-rl'" in refused("flux-r1", "--to", "numpy")
    for to in ("comfyui", "diffusers"):
        assert "does not say whether its model is a flow model" in refused("formless", "--to", to)
    assert "classifier-free" in refused("embedded", "--to", "comfyui")
    assert "without prompts" in refused("silent", "--to", "diffusers")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.txt").read_text() == "mine"


def test_a_file_is_named_after_its_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    solver().save_pretrained("runs/2 b/solver")
    for source, to, name in (
        ("flux-rl", "comfyui", "flux_rl_comfyui.py"),
        ("runs/2 b/solver", "json", "solver_2_b.json"),
        ("runs/2 b/solver/solver.json", "numpy", "solver_2_b.npz"),
    ):
        result = CliRunner().invoke(app, ["export", source, "--to", to])
        assert result.exit_code == 0 and result.stdout == f"{to}: {name}\n" and Path(name).is_file()
    result = CliRunner().invoke(app, ["export", "flux-rl", "--to", "sigmas"])
    assert result.stdout.splitlines()[1].startswith("noise levels alone: left out the 2 points of each interval")


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    for to in get_args(ExportFormat):
        with pytest.raises(Exception, match="No space left"):
            export(solver(), "x", to, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_local_model_is_named_without_its_folder(tmp_path: Path) -> None:
    found = solver(meta={"model_id": str(tmp_path / "home" / "mine")})
    text = export(found, "x", "comfyui", tmp_path / "x.py").path.read_text()
    assert "the model mine" in text and str(tmp_path) not in text
