"""The scheduler where pictures begin from pictures, against a loop that is typed here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, SD3ControlNetModel
from PIL import Image
from torch import Tensor

from epd_ray.deploy.parallelize import guide
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import TableError
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.conditioned import ConditionedDrift
from tests.families import PROMPTS, Calls, backbones, folder
from tests.tiny_models import TOKENS, save_sd

SIGMAS = {"ve": [14.6146, 4.0, 1.2, 0.1], "flow": [1.0, 0.8, 0.45, 0.1]}
N, SCALE = 3, 4.0
NAMES = ("sd", "sdxl", "sd3_t5", "flux")
FIRST = {
    "sd": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3_t5": "StableDiffusion3",
    "sd3_wide": "StableDiffusion3", "flux": "Flux",
}  # fmt: skip
HISTORY = [[0.0, 0.0], [0.3, 0.0], [0.2, -0.1]]


def solver_for(name: str, *, points: int = 2, start: bool = False, afs: bool = False, **parts: Any) -> Solver:
    backbone = backbones(name)
    r, w, o, c = torch.rand(4, N, points, generator=torch.Generator().manual_seed(points), dtype=torch.float64)
    o, c = 0.9 + 0.2 * o, 0.9 + 0.1 * c
    if start:
        r[:, 0], c[:, 0] = 0.0, 1.0
    columns = {"positions": r.sort(-1).values, "weights": w.softmax(-1), "scale_dir": o, "scale_time": c}
    table = SolverTable.from_lists({name: values.tolist() for name, values in columns.items()} | parts)
    sigmas = torch.tensor(SIGMAS[backbone.form], dtype=torch.float64)
    return Solver(table, sigmas, backbone.form, afs, meta={"scheduler": backbone.facts["scheduler"]})


def euler_solver(name: str) -> Solver:
    return solver_for(name, points=1, start=True)


def open_as(name: str, kind: str, **more: Any) -> Any:
    """The pipeline of a kind with the network of a text-to-image pipeline."""
    whole = diffusers.DiffusionPipeline.from_pretrained(folder(name), low_cpu_mem_usage=False)
    extra = {"requires_safety_checker": False} if name == "sd" else {}
    pipe = getattr(diffusers, FIRST[name] + kind)(**whole.components, **extra, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture() -> Image.Image:
    found = Image.new("RGB", (16, 16), "red")
    found.paste((0, 60, 200), (3, 2, 9, 11))
    return found


def call(pipe: Any, seed: int = 0, **options: Any) -> Tensor:
    given: dict[str, Any] = {
        "prompt": PROMPTS, "num_inference_steps": N, "guidance_scale": SCALE, "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed), **options,
    }  # fmt: skip
    if hasattr(pipe, "transformer"):
        given["max_sequence_length"] = TOKENS
    with torch.random.fork_rng():  # some pipelines encode pictures without their generator
        torch.manual_seed(seed)
        return pipe(**given).images


Drift = Callable[[Tensor, float], Tensor]


def own_drift(name: str) -> Drift:
    backbone = backbones(name)
    drift = ConditionedDrift(backbone, backbone.encode(PROMPTS, SCALE))
    return lambda x, sigma: drift(x, x.new_full((len(x),), sigma))


@torch.inference_mode()
def by_loop(
    drift: Drift, solver: Solver, x: Tensor, begin: int = 0, repaint: Callable[[Tensor, float], Tensor] | None = None
) -> Tensor:
    """The solver from interval `begin` on; `repaint` acts on each state that the network will see next."""
    table, sigmas = solver.table, solver.sigmas.tolist()
    assert table.scale_dir is not None and table.scale_time is not None
    older: list[Tensor] = []
    for i in range(begin, N):
        a, b = sigmas[i : i + 2]
        first = drift(x, a)
        total = torch.zeros_like(x)
        for r, w, o, c in zip(
            *(column[i].tolist() for column in (table.positions, table.weights, table.scale_dir, table.scale_time)),
            strict=True,
        ):  # fmt: skip
            s = b**r * a ** (1 - r)
            x_k = x + (s - a) * first
            if r > 0 and repaint is not None:
                x_k = repaint(x_k, s)
            total = total + w * o * c * (drift(x_k, c * s) if r > 0 else first)
        if table.history is not None:
            for weight, drift_before in zip(table.history[i].tolist(), older, strict=False):
                total = total + weight * (first - drift_before)
        older.insert(0, first)
        x = x + (b - a) * total
        if repaint is not None:
            x = repaint(x, b if i < N - 1 else 0.0)  # pipelines put the clean picture back at the end
    return x


def noisy(form: str, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    return clean + sigma * noise if form == "ve" else (1 - sigma) * clean + sigma * noise


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.isfinite().all()
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 2e-5


def recorded(scheduler: EPDScheduler, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The clean latents and the noise that the pipeline asks to be mixed."""
    seen: list[tuple[Tensor, Tensor]] = []
    mix = scheduler.add_noise

    def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        seen.append((clean, noise))
        return mix(clean, noise, timesteps)

    monkeypatch.setattr(scheduler, "add_noise", add_noise)
    return seen


def sized(name: str) -> dict[str, int]:
    return {"height": 16, "width": 16} if name in ("sd3_t5", "flux") else {}


# -- image to image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "begin"), [(1.0, 0), (2 / 3, 1), (1 / 3, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_image_to_image_begins_at_an_interval(
    name: str, strength: float, begin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = euler_solver(name) if name == "flux" else solver_for(name, history=HISTORY)
    pipe = open_as(name, "Img2ImgPipeline")
    pipe.scheduler = EPDScheduler.from_solver(solver)
    seen = recorded(pipe.scheduler, monkeypatch)
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    with Calls(network) as watched:
        found = call(pipe, image=picture(), strength=strength, **sized(name))
    assert len(watched.batches) == (N - begin) * pipe.scheduler.order
    clean, noise = seen[0]
    start = noisy(solver.form or "", clean, noise, solver.sigmas[begin].item())
    start = pipe._pack_latents(start, 2, 4, 8, 8) if name == "flux" else start
    close(found, by_loop(own_drift(name), solver, start, begin))
    assert pipe.scheduler.begin_index == begin * pipe.scheduler.order


@pytest.mark.parametrize("name", ["sd", "sd3_t5"])
def test_guidance_of_each_interval_in_image_to_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval at which the picture begins would reuse what an interval before it found: it makes both passes."""
    solver = solver_for(name, guidance=[5.0, 3.0, 2.0], reuse=[False, True, True])
    pipe = guide(open_as(name, "Img2ImgPipeline"), solver)
    seen = recorded(pipe.scheduler, monkeypatch)
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    with Calls(network) as watched:
        found = call(pipe, image=picture(), strength=2 / 3, **sized(name))
    assert watched.batches == [4, 2, 2, 2, 2, 2]
    backbone, scales = backbones(name), iter([3.0] * 3 + [2.0] * 3)
    effects: list[Tensor] = []

    def drift(x: Tensor, sigma: float) -> Tensor:
        at = x.new_full((2,), sigma)
        text, empty = (backbone.drift(x, at, backbone.encode(prompts, 1.0)) for prompts in (PROMPTS, ["", ""]))
        effects.append(text - empty)
        return text + (next(scales) - 1) * effects[0]

    clean, noise = seen[0]
    close(found, by_loop(drift, solver, noisy(solver.form or "", clean, noise, solver.sigmas[1].item()), 1))


# -- inpainting -------------------------------------------------------------------------------------------------------


def left_half() -> Image.Image:
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    return mask


@pytest.mark.parametrize("strength", [1.0, 2 / 3])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3_wide", "flux"])
def test_inpainting_repaints_at_each_point(name: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    solver = euler_solver(name) if name == "flux" else solver_for(name)
    pipe = open_as(name, "InpaintPipeline")
    pipe.scheduler = EPDScheduler.from_solver(solver)
    seen = recorded(pipe.scheduler, monkeypatch)
    found = call(pipe, image=picture(), mask_image=left_half(), strength=strength, height=16, width=16)
    mask = torch.zeros(2, 16 if name == "sd3_wide" else 4, 8, 8)
    mask[..., :4] = 1
    if name == "flux":
        mask = pipe._pack_latents(mask, 2, 4, 8, 8)
    clean, noise = seen[-1]
    form, begin = solver.form or "", 0 if strength == 1 else 1
    start = solver.sigmas[begin].item()
    x = noisy(form, clean, noise, start)
    if strength == 1 and form == "ve":  # these pipelines then begin from noise alone
        x = noise * start

    def repaint(x: Tensor, sigma: float) -> Tensor:
        return (1 - mask) * noisy(form, clean, noise, sigma) + mask * x

    close(found, by_loop(own_drift(name), solver, x, begin, repaint))


# -- ControlNet -------------------------------------------------------------------------------------------------------


def controlled(name: str) -> Any:
    whole = diffusers.DiffusionPipeline.from_pretrained(folder(name), low_cpu_mem_usage=False)
    if name == "sd3_t5":
        net = SD3ControlNetModel.from_transformer(whole.transformer, num_layers=1, num_extra_conditioning_channels=0)
    else:
        net = ControlNetModel.from_unet(whole.unet, conditioning_embedding_out_channels=(4, 8))
    with torch.no_grad():
        for i, values in enumerate(net.parameters()):  # new ones would give zeros
            values.copy_(0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(i)))
    pipe = open_as(name, "ControlNetPipeline", controlnet=net)
    with torch.no_grad():  # that for SD3 draws its control image's latents: here with next to no variance
        pipe.vae.encoder.conv_out.weight[4:] = 0
        pipe.vae.encoder.conv_out.bias[4:] = -40
    return pipe


def pipelines_drift(pipe: Any, solver: Solver, **options: Any) -> Drift:
    """The drift that a pipeline's network and ControlNet have, read from one Euler step of an interval of its own."""

    def drift(x: Tensor, sigma: float) -> Tensor:
        one = SolverTable(torch.zeros(1, 1).double(), torch.ones(1, 1).double())
        sigmas = torch.tensor([sigma, sigma / 2], dtype=torch.float64)
        pipe.scheduler = EPDScheduler.from_solver(Solver(one, sigmas, solver.form, meta=solver.meta))
        scale = sigma if solver.form == "ve" else 1.0
        return (call(pipe, latents=x / scale, **options) - x) / (-sigma / 2)

    return drift


def test_a_network_that_sees_the_mask(tmp_path: Path) -> None:
    """The UNet of an inpainting model has the mask and the rest of the picture as inputs; nothing is repainted."""
    whole = diffusers.DiffusionPipeline.from_pretrained(save_sd(tmp_path, in_channels=9), low_cpu_mem_usage=False)
    pipe = diffusers.StableDiffusionInpaintPipeline(**whole.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    solver, noise = solver_for("sd"), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    options: dict[str, Any] = {
        "image": picture(), "mask_image": left_half(), "height": 16, "width": 16, "strength": 1.0,
    }  # fmt: skip
    expected = by_loop(pipelines_drift(pipe, solver, **options), solver, noise * solver.sigmas[0].item())
    pipe.scheduler = EPDScheduler.from_solver(solver)
    found = call(pipe, latents=noise, **options)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3_t5"])
def test_a_controlnet_is_asked_at_each_point(name: str) -> None:
    solver, pipe = solver_for(name), controlled(name)
    control = "control_image" if name == "sd3_t5" else "image"
    options: dict[str, Any] = {control: picture(), "height": 16, "width": 16}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    x = noise * (solver.sigmas[0].item() if solver.form == "ve" else 1.0)
    expected = by_loop(pipelines_drift(pipe, solver, **options), solver, x)
    pipe.scheduler = EPDScheduler.from_solver(solver)
    found = call(pipe, latents=noise, **options)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4
    assert not torch.allclose(found, by_loop(own_drift(name), solver, x), rtol=1e-2)  # the control acts
    third = call(pipe, latents=noise, control_guidance_end=1 / 3, **options)
    assert not torch.allclose(third, found, rtol=1e-2)
    with pytest.raises(TableError, match=r"parts the points of one interval .pass multiples of 1/3"):
        call(pipe, latents=noise, control_guidance_end=0.5, **options)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3_t5"])
def test_guidance_of_each_interval_beside_a_controlnet(name: str) -> None:
    """A table that sets scale 1 everywhere is the pipeline without guidance, with one pass an evaluation."""
    pipe = controlled(name)
    options = {"control_image" if name == "sd3_t5" else "image": picture(), "height": 16, "width": 16}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    pipe.scheduler = EPDScheduler.from_solver(solver_for(name))
    expected = call(pipe, latents=noise, **{**options, "guidance_scale": 1.0})
    guide(pipe, solver_for(name, guidance=[1.0, 1.0, 1.0]))
    with Calls(pipe.transformer if hasattr(pipe, "transformer") else pipe.unet) as watched:
        found = call(pipe, latents=noise, **options)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4
    assert set(watched.batches) == {2}


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_another_number_of_steps_would_begin_elsewhere(name: str, steps: int) -> None:
    pipe = open_as(name, "Img2ImgPipeline")
    pipe.scheduler = EPDScheduler.from_solver(solver_for(name))
    said = "takes the 9 calls.*pass strength=1" if name == "flux" else f"is {steps}, expected 3.*num_inference_steps=3"
    with pytest.raises(TableError, match=said) as caught:
        call(pipe, image=picture(), strength=0.5, num_inference_steps=steps, **sized(name))
    assert "\n" not in str(caught.value)


def test_what_cannot_begin_later_says_what_to_do() -> None:
    pipe = open_as("sd", "Img2ImgPipeline")
    pipe.scheduler = EPDScheduler.from_solver(solver_for("sd", afs=True))
    with pytest.raises(TableError, match=r"analytical .pass strength=1, or use a solver without afs"):
        call(pipe, image=picture(), strength=2 / 3)
    assert call(pipe, image=picture(), strength=1.0).isfinite().all()
    pipe.scheduler = EPDScheduler.from_solver(solver_for("sd"))
    with pytest.raises(TableError, match=r"strength leaves none of the solver's 3 intervals .*at least 0.3"):
        call(pipe, image=picture(), strength=0.2)


def test_a_point_that_cannot_be_repainted_is_refused() -> None:
    pipe = open_as("sd", "InpaintPipeline")
    pipe.scheduler = EPDScheduler.from_solver(solver_for("sd", afs=True))
    with pytest.raises(TableError, match=r"the picture is repainted.*use a solver without afs"):
        call(pipe, image=picture(), mask_image=left_half(), strength=1.0, height=16, width=16)


def test_a_refiner_is_refused() -> None:
    pipe = open_as("sdxl", "Img2ImgPipeline")
    pipe.scheduler = EPDScheduler.from_solver(solver_for("sdxl"))
    with pytest.raises(TableError, match=r"denoising_start is 0\.5, expected None"):
        call(pipe, image=picture(), strength=2 / 3, denoising_start=0.5)


@pytest.mark.parametrize("form", ["sd", "sd3_t5"])
def test_noise_for_another_step_is_refused(form: str) -> None:
    """A pipeline that cuts the timesteps without telling the scheduler would draw something else."""
    scheduler = EPDScheduler.from_solver(solver_for(form))
    scheduler.set_timesteps()
    x = torch.zeros(1, 4, 2, 2)
    later = scheduler.timesteps[scheduler.order :][:1]
    with pytest.raises(TableError, match=r"noise for timestep .* is asked for, expected .*set_begin_index"):
        scheduler.add_noise(x, x, later)
    scheduler.set_begin_index(scheduler.order)
    assert scheduler.add_noise(x, x + 1, later).flatten()[0].item() == pytest.approx(scheduler.sigmas[3].item())
    scheduler.set_timesteps()
    if scheduler.form == "ve":
        scheduler.scale_model_input(x)
    with pytest.raises(TableError, match=r"timesteps\[3\] is taken, expected timesteps\[0\].*set_begin_index"):
        scheduler.step(x, scheduler.timesteps[3:][0], x)
    with pytest.raises(TableError, match="begin_index is 2, expected 0 or 3 or 6"):
        scheduler.set_begin_index(2)
