"""The guidance of each interval in unmodified pipelines, against the library's own sampler on the same files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from torch import Tensor

from epd_ray.deploy.parallelize import guide, parallelize, restore
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import ModelError, TableError
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.conditioned import ConditionedDrift
from epd_ray.solvers.epd import epd
from tests.families import FREE, PROMPTS, Calls, backbones, folder
from tests.families import load as load_backbone
from tests.tiny_models import TOKENS, save_ddpm, save_sd

VE, FLOW = [14.6146, 4.0, 1.2, 0.4, 0.1], [1.0, 0.8, 0.5, 0.3, 0.1]
NAMES = ("sd", "sd_v", "sdxl", "sd3_t5", "flux")
SCALES = [5.0, 3.0, 1.0, 6.0]
REUSE = [False, True, False, True]
HISTORY = [[0.0, 0.0], [0.3, 0.0], [0.2, -0.1], [0.1, 0.2]]
SCALE = 4.0  # of the pipeline


def solver_for(name: str, *, points: int = 2, start: bool = True, **parts: Any) -> Solver:
    """N = 4 intervals, with the given parts as lists."""
    backbone = backbones(name)
    r, w = torch.rand(2, 4, points, generator=torch.Generator().manual_seed(points), dtype=torch.float64)
    if start:
        r[:, 0] = 0.0
    table = SolverTable.from_lists({
        "positions": r.sort(-1).values.tolist(), "weights": w.softmax(-1).tolist(), **parts,
    })  # fmt: skip
    sigmas = torch.tensor(VE if backbone.form == "ve" else FLOW, dtype=torch.float64)
    return Solver(table, sigmas, backbone.form, meta={"scheduler": backbone.facts["scheduler"]})


def pipeline(path: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(path, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def call(pipe: Any, **options: Any) -> Tensor:
    size = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 4, "guidance_scale": SCALE}
    if hasattr(pipe, "transformer"):
        size["max_sequence_length"] = TOKENS
    packed = hasattr(pipe, "_pack_latents")
    latents = pipe._pack_latents(noise(), 2, 4, 8, 8) if packed else noise()
    return pipe(**{"prompt": PROMPTS, "latents": latents, **size, **options}).images


def own(backbone: Any, solver: Solver, scale: float = SCALE) -> Tensor:
    """What the library itself draws."""
    x = backbone.initial(noise()) if backbone.form == "flow" else noise() * solver.sigmas[0].item()
    drift = ConditionedDrift(backbone, backbone.encode(PROMPTS, scale))
    with torch.inference_mode():
        return epd(drift, x.float(), solver.sigmas, solver.table, form=backbone.form)


def network(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.isfinite().all()
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 2e-5


WAYS: dict[str, Callable[[Any, Solver], Any]] = {"guide": guide, "parallelize": parallelize}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_librarys_own_sampler_and_asks_for_as_few_rows(name: str, way: str) -> None:
    solver = solver_for(name, points=3, guidance=SCALES, reuse=REUSE, history=HISTORY)
    pipe = WAYS[way](pipeline(folder(name)), solver)
    with Calls(network(pipe)) as watched:
        found = call(pipe)
    close(found, own(backbones(name), solver))
    passes = [2, 1, 1, 1] if name in FREE else [1, 1, 1, 1]
    each = (1, 2) if way == "parallelize" else (1, 1, 1)
    assert watched.batches == [2 * passes[i] * points for i in range(4) for points in each]  # of 2 pictures
    assert sum(watched.batches) == 2 * solver.table.cost().network_passes(SCALE, name in FREE)  # type: ignore[operator]
    assert not torch.allclose(found, own(backbones(name), solver_for(name, points=3, history=HISTORY)), rtol=1e-3)


@pytest.mark.parametrize("parts", [{"guidance": SCALES}, {"reuse": REUSE}, {}], ids=lambda parts: "".join(parts))
@pytest.mark.parametrize("name", ["sd_v", "sd3_t5"])
def test_each_part_alone_and_points_that_are_no_starts(name: str, parts: dict[str, Any]) -> None:
    solver = solver_for(name, start=False, **parts)
    expected = own(backbones(name), solver)
    pipe = guide(pipeline(folder(name)), solver)
    close(call(pipe), expected)
    close(call(pipe), expected)  # nothing is left of the call before
    close(call(parallelize(pipe, solver)), expected)


def test_the_euler_form_halves_what_the_network_sees_where_it_reuses() -> None:
    solver = solver_for("sd3_t5", points=1, reuse=REUSE)
    pipe = guide(pipeline(folder("sd3_t5")), solver)
    with Calls(network(pipe)) as watched:
        close(call(pipe), own(backbones("sd3_t5"), solver))
    assert watched.batches == [4, 2, 4, 2]


def test_the_grid_is_in_the_schedulers_sigmas() -> None:
    shares = [0.4, 0.1, 0.3, 0.2]
    solver = solver_for("sd3_t5", grid=shares, history=HISTORY)
    plain = solver_for("sd3_t5", history=HISTORY)
    pipe = pipeline(folder("sd3_t5"))
    pipe.scheduler = EPDScheduler.from_solver(solver)
    found = call(pipe)
    table = SolverTable.from_lists({**plain.table.to_lists(), "grid": shares})
    unplaced = Solver(plain.table, plain.sigmas, "flow")
    x = backbones("sd3_t5").initial(noise())
    drift = ConditionedDrift(backbones("sd3_t5"), backbones("sd3_t5").encode(PROMPTS, SCALE))
    with torch.inference_mode():
        close(found, epd(drift, x, unplaced.sigmas, table, form="flow"))
    assert not torch.allclose(found, own(backbones("sd3_t5"), plain), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd", {"guidance_rescale": 0.7}),
        ("sdxl", {"guidance_rescale": 0.7, "negative_prompt": PROMPTS[::-1]}),
        ("sd3_t5", {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.6,
                    "num_inference_steps": 8}),
    ],
)  # fmt: skip
def test_what_else_a_pipeline_does_with_its_halves_stays_right(name: str, options: dict[str, Any]) -> None:
    """A table that sets scale 3 everywhere in a pipeline of scale 5 is the pipeline of scale 3."""
    pipe = pipeline(folder(name))
    pipe.scheduler = EPDScheduler.from_solver(solver_for(name))
    expected = call(pipe, guidance_scale=3.0, **options)
    told = solver_for(name, guidance=[3.0] * 4)
    close(call(guide(pipe, told), guidance_scale=5.0, **options), expected)
    close(call(parallelize(pipe, told), guidance_scale=5.0, **options), expected)


def test_a_network_that_is_told_its_scale(tmp_path: Path) -> None:
    path = save_sd(tmp_path, time_cond_proj_dim=8)
    solver = solver_for("sd", guidance=SCALES, reuse=REUSE)
    pipe = guide(pipeline(path), solver)
    with Calls(network(pipe)) as watched:
        close(call(pipe), own(load_backbone(path), solver))
    assert set(watched.batches) == {2}


def test_half_precision_and_several_pictures() -> None:
    solver = solver_for("sd3_t5", guidance=SCALES, reuse=REUSE)
    pipe = guide(pipeline(folder("sd3_t5")), solver)
    exact = call(pipe)
    half = call(pipe.to(torch.bfloat16), latents=noise().bfloat16())
    assert half.dtype == torch.bfloat16
    assert ((half.float() - exact).abs().mean() / exact.abs().mean()).item() < 0.05
    assert len(call(pipe, num_images_per_prompt=2, latents=None)) == 4


def test_restore_leaves_no_trace() -> None:
    pipe = pipeline(folder("sd"))
    former = pipe.scheduler
    expected = call(pipe)
    guide(pipe, solver_for("sd", guidance=SCALES))
    assert len(pipe.unet._forward_pre_hooks) == 1
    guide(pipe, solver_for("sd", reuse=REUSE))  # in its place
    assert len(pipe.unet._forward_pre_hooks) == 1
    mine = pipe.scheduler
    pipe.scheduler = former
    assert torch.equal(call(pipe), expected)  # the hooks rest while another scheduler is in use
    pipe.scheduler = mine
    assert restore(pipe).scheduler is former
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_hooks
    assert torch.equal(call(pipe), expected)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_scheduler_alone_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    solver = solver_for("sd3_t5", guidance=SCALES)
    solver.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "from epd_ray import guide\n" in card and '\npipe = guide(pipe, "' in card
    pipe = pipeline(folder("sd3_t5"))
    pipe.scheduler = EPDScheduler.from_pretrained(tmp_path)
    with pytest.raises(TableError, match=r"which a scheduler alone cannot.*call guide or parallelize") as caught:
        call(pipe)
    assert "\n" not in str(caught.value)
    pipe = pipeline(folder("sd3_t5"))
    close(call(guide(pipe, tmp_path)), own(backbones("sd3_t5"), solver))


@pytest.mark.parametrize("way", WAYS)
def test_a_pipeline_without_guidance_is_refused(way: str) -> None:
    pipe = WAYS[way](pipeline(folder("sd")), solver_for("sd", guidance=SCALES))
    with pytest.raises(TableError, match=r"sets guidance scale 5, but the pipeline's guidance_scale is 1, without"):
        call(pipe, guidance_scale=1.0)
    pipe = WAYS[way](pipeline(folder("sd")), solver_for("sd", guidance=[1.0, 0.5, 1.0, 1.0]))
    close(call(pipe, guidance_scale=1.0), call(pipe, guidance_scale=3.0))  # which has no pass to spare


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_knows_no_scale_is_refused(way: str) -> None:
    with pytest.raises(ModelError, match="takes no guidance scale"):
        WAYS[way](pipeline(folder("flux_schnell")), solver_for("flux", guidance=SCALES))


def test_a_pipeline_of_another_kind_is_refused(tmp_path: Path) -> None:
    pipe = DDPMPipeline.from_pretrained(save_ddpm(tmp_path), low_cpu_mem_usage=False)
    with pytest.raises(ModelError, match="DDPMPipeline has no hook for the guidance of each interval") as caught:
        guide(pipe, solver_for("sd", guidance=SCALES))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="is of form 've'"):
        guide(pipeline(folder("sd")), solver_for("sd3_t5", guidance=SCALES))


def test_passes_that_cannot_be_left_out_are_refused() -> None:
    pipe = guide(pipeline(folder("flux")), solver_for("flux", reuse=REUSE))
    with pytest.raises(TableError, match="leave true_cfg_scale out"):
        call(pipe, true_cfg_scale=2.0, negative_prompt=PROMPTS[::-1])
    pipe = parallelize(pipeline(folder("sd3_t5")), solver_for("sd3_t5", reuse=REUSE))
    with pytest.raises(TableError, match="take guide in place of parallelize"):
        call(pipe, skip_guidance_layers=[0], skip_layer_guidance_stop=0.6, num_inference_steps=8)
