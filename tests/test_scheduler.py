"""The scheduler inside unmodified pipelines, against the solver's own loop on the pipeline's network."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import ScheduleError, TableError
from epd_ray.solvers import Solver, SolverTable, schedules
from epd_ray.types import Form
from tests.tiny_models import SD_BETAS, save_ddpm, save_flux, save_sd, save_sd3, save_sdxl

PROMPTS = ["a red circle", "a blue star"]
BETAS: dict[str, Any] = {k: v for k, v in SD_BETAS.items() if k != "steps_offset"}
FLOW_SIGMAS = [1.0, 0.8, 0.45, 0.1]
VE_SIGMAS = [14.6146, 4.0, 1.2, 0.1]


@dataclass(frozen=True)
class Family:
    """A pipeline, how to call it, and its network as a drift written out by hand."""

    name: str
    pipeline: type[Any]
    form: Form
    options: dict[str, Any]
    prediction: str = "flow_prediction"

    @property
    def facts(self) -> dict[str, Any]:
        betas = BETAS if self.form == "ve" else {}
        return {"prediction_type": self.prediction, "num_train_timesteps": 1000, **betas}


SMALL = {"height": 16, "width": 16, "output_type": "latent"}
SD3_SMALL = {**SMALL, "max_sequence_length": 16}
FAMILIES = {
    "sd": Family("sd", StableDiffusionPipeline, "ve", {**SMALL, "guidance_scale": 5.0}, "epsilon"),
    "sd-v": Family("sd-v", StableDiffusionPipeline, "ve", {**SMALL, "guidance_scale": 3.0}, "v_prediction"),
    "sdxl": Family("sdxl", StableDiffusionXLPipeline, "ve", {**SMALL, "guidance_scale": 5.0}, "epsilon"),
    "sd3": Family("sd3", StableDiffusion3Pipeline, "flow", {**SD3_SMALL, "guidance_scale": 4.5}),
    "flux": Family("flux", FluxPipeline, "flow", {**SD3_SMALL, "guidance_scale": 3.5}),
}
SAVERS: dict[str, Callable[[Path], Path]] = {
    "sd": save_sd,
    "sd-v": lambda folder: save_sd(folder, prediction_type="v_prediction"),
    "sdxl": save_sdxl,
    "sd3": lambda folder: save_sd3(folder, t5=True),
    "flux": save_flux,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = SAVERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture
def load(folders: Callable[[str], Path]) -> Callable[..., Any]:
    def open_pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
        pipe = FAMILIES[name].pipeline.from_pretrained(folders(name), dtype=dtype, low_cpu_mem_usage=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(dtype=dtype)  # without accelerate, a network may have kept its file's

    return open_pipeline


def make_solver(
    family: Family,
    points: int = 2,
    *,
    scales: bool = True,
    afs: bool = False,
    order: int = 1,
    start_point: bool = False,
    history: bool = False,
) -> Solver:
    r, q, o, c = torch.rand(4, 3, points, generator=torch.Generator().manual_seed(points), dtype=torch.float64)
    if start_point:
        r[:, 0], c[:, 0] = 0.0, 1.0
    scaled = (0.9 + 0.2 * o, 0.9 + 0.1 * c) if scales else (None, None)
    past = torch.tensor([[0.0, 0.0], [0.4, 0.0], [0.3, -0.1]], dtype=torch.float64) if history else None
    table = SolverTable(r.sort(-1).values, q.softmax(-1), *scaled, history=past)
    sigmas = torch.tensor(VE_SIGMAS if family.form == "ve" else FLOW_SIGMAS, dtype=torch.float64)
    meta = {"model_id": f"tiny/{family.name}", "scheduler": family.facts, "guidance_scale": 4.5}
    return Solver(table, sigmas, family.form, afs, order, meta)


def call(pipe: Any, family: Family, seed: int = 0, **options: Any) -> Tensor:
    given = {"prompt": PROMPTS, "num_inference_steps": 3, **family.options, **options}
    return pipe(generator=torch.Generator().manual_seed(seed), **given).images


def by_hand(pipe: Any, family: Family, solver: Solver, seed: int = 0, guidance: float | None = None) -> Tensor:
    """Solver.solve on the network, with nothing from the scheduler."""
    scale = family.options["guidance_scale"] if guidance is None else guidance
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    alphas = (1 - torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000).double() ** 2).cumprod(0)
    guided = scale > 1

    def mix(output: Tensor) -> Tensor:
        if not guided:
            return output
        empty, text = output.chunk(2)
        return empty + scale * (text - empty)

    def rows(tensor: Tensor, count: int) -> Tensor:
        halves = tensor.chunk(2) if guided and len(tensor) == 4 else (tensor,)
        return torch.cat([half.repeat_interleave(count // 2, 0) for half in halves])

    def twice(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if guided else tensor

    if family.name == "flux":
        embeds, pooled, text_ids = pipe.encode_prompt(PROMPTS, None, max_sequence_length=16)
        image_ids = pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)

        def flux(x: Tensor, sigma: Tensor) -> Tensor:
            n = len(x)
            return pipe.transformer(
                hidden_states=x, timestep=sigma, guidance=torch.full([n], scale),
                pooled_projections=pooled.repeat_interleave(n // 2, 0),
                encoder_hidden_states=embeds.repeat_interleave(n // 2, 0), txt_ids=text_ids, img_ids=image_ids,
            ).sample  # fmt: skip

        return solver.solve(flux, pipe._pack_latents(noise, 2, 4, 8, 8))
    if family.name == "sd3":
        embeds, negative, pooled, no_pooled = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=guided, max_sequence_length=16
        )
        embeds, pooled = (torch.cat([negative, embeds]), torch.cat([no_pooled, pooled])) if guided else (embeds, pooled)

        def sd3(x: Tensor, sigma: Tensor) -> Tensor:
            n = len(x)
            return mix(
                pipe.transformer(
                    hidden_states=twice(x), timestep=twice(1000 * sigma), encoder_hidden_states=rows(embeds, n),
                    pooled_projections=rows(pooled, n),
                ).sample
            )  # fmt: skip

        return solver.solve(sd3, noise)
    added: dict[str, Tensor] = {}
    if family.name == "sdxl":
        embeds, negative, pooled, no_pooled = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=guided)
        embeds = torch.cat([negative, embeds]) if guided else embeds
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(len(embeds), 1)
        added = {"text_embeds": torch.cat([no_pooled, pooled]) if guided else pooled, "time_ids": sizes}
    else:
        embeds, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, guided)
        embeds = torch.cat([negative, embeds]) if guided else embeds

    def ve(x: Tensor, sigma: Tensor) -> Tensor:
        n, s = len(x), sigma[:, None, None, None]
        output = mix(
            pipe.unet(
                twice(x / (s**2 + 1).sqrt()), twice(schedules.sigma_to_timestep(sigma, alphas).float()),
                encoder_hidden_states=rows(embeds, n),
                added_cond_kwargs={k: rows(v, n) for k, v in added.items()} or None,
            ).sample
        )  # fmt: skip
        if family.prediction == "epsilon":
            return output
        denoised = x / (s**2 + 1) - s / (s**2 + 1).sqrt() * output
        return (x - denoised) / s

    return solver.solve(ve, noise * solver.sigmas[0].item())


def difference(result: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert result.shape == expected.shape and result.isfinite().all()
    return ((result - expected).abs().max() / expected.abs().max()).item()


VARIANTS = {
    "two-points": {},
    "afs": {"afs": True},
    "three-points-order-three": {"points": 3, "order": 3},
    "one-point-afs-order-two": {"points": 1, "afs": True, "order": 2, "scales": False},
    "start-point-order-two": {"points": 3, "order": 2, "start_point": True},
    "start-point-afs": {"points": 2, "afs": True, "start_point": True},
    "history": {"start_point": True, "history": True},
    "start-point-alone": {"points": 1, "start_point": True},
}
# Each variant on a model of each form, since nothing but the form changes how a solver steps; and each model on two.
CASES = [
    (name, variant)
    for name in FAMILIES
    for variant in VARIANTS
    if name in ("sd", "sd3") or variant in ("two-points", "start-point-afs")
]


@pytest.mark.parametrize(("name", "variant"), CASES)
@torch.no_grad()
def test_equals_the_solvers_own_loop(load: Any, name: str, variant: str) -> None:
    pipe, family = load(name), FAMILIES[name]
    solver = make_solver(family, **VARIANTS[variant])
    pipe.scheduler = EPDScheduler.from_solver(solver)
    calls: list[int] = []
    network = pipe.unet if family.form == "ve" else pipe.transformer
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    result = call(pipe, family)
    assert len(calls) == solver.model_evals + (solver.afs and family.form == "flow")
    assert difference(result, by_hand(pipe, family, solver)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_works_without_guidance_and_for_several_images(load: Any, name: str) -> None:
    pipe, family = load(name), FAMILIES[name]
    solver = make_solver(family)
    pipe.scheduler = EPDScheduler.from_solver(solver)
    result = call(pipe, family, guidance_scale=1.0)
    assert difference(result, by_hand(pipe, family, solver, guidance=1.0)) < 1e-5
    assert len(call(pipe, family, num_images_per_prompt=2)) == 4


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_decodes_pictures(load: Any, name: str) -> None:
    pipe, family = load(name), FAMILIES[name]
    pipe.scheduler = EPDScheduler.from_solver(make_solver(family))
    assert call(pipe, family, output_type="pil")[0].size == (16, 16)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_calls_do_not_leak_into_each_other(load: Any, name: str) -> None:
    pipe, family = load(name), FAMILIES[name]
    pipe.scheduler = EPDScheduler.from_solver(make_solver(family, order=3))
    first = call(pipe, family)
    assert torch.equal(call(pipe, family), first)

    def fail(pipe: Any, i: int, t: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == 4:
            raise RuntimeError("stopped")
        return {}

    with pytest.raises(RuntimeError, match="stopped"):
        call(pipe, family, seed=1, callback_on_step_end=fail)
    assert torch.equal(call(pipe, family), first)
    assert torch.equal(call(pipe, family, prompt=PROMPTS[:1], seed=1), call(pipe, family, prompt=PROMPTS[:1], seed=1))


def hand_over(scheduler: EPDScheduler, sample: Tensor, network: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """A pipeline's loop with a network that is a function of the latents alone."""
    states = [sample]
    scheduler.set_timesteps()
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(states[-1], t) if scheduler.form == "ve" else states[-1]
        states.append(scheduler.step(network(shown), t, states[-1]).prev_sample)
    return states


def test_state_stays_float32_under_half_precision() -> None:
    family = FAMILIES["sd3"]
    solver = make_solver(family)
    scheduler = EPDScheduler.from_solver(solver)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    halves = hand_over(scheduler, x, lambda latents: torch.full_like(latents, 0.001))
    assert all(state.dtype == torch.bfloat16 for state in halves)
    exact = solver.solve(lambda x, sigma: torch.full_like(x, x.new_tensor(0.001).bfloat16().float()), x.float())
    assert torch.equal(halves[-1], exact.bfloat16())
    scheduler.set_timesteps()
    copied = x
    for t in scheduler.timesteps:  # another tensor of the same values counts as it is
        copied = scheduler.step(torch.full_like(copied, 0.001), t, copied.clone(), return_dict=False)[0]
    assert not torch.equal(copied, exact.bfloat16())


@pytest.mark.parametrize("inference", [True, False])
def test_takes_what_a_callback_changed(inference: bool) -> None:
    scheduler = EPDScheduler.from_solver(make_solver(FAMILIES["sd3"]))
    with torch.inference_mode(inference):
        scheduler.set_timesteps()
        sample = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
        for t in scheduler.timesteps[:3]:
            sample = scheduler.step(torch.zeros_like(sample), t, sample)[0]
        changed = sample * 3 if inference else sample.mul_(3)
        sample = changed
        for t in scheduler.timesteps[3:]:
            sample = scheduler.step(torch.zeros_like(sample), t, sample)[0]
        assert torch.equal(sample, torch.full_like(sample, 3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_predictions_describe_the_same_drift(prediction: str) -> None:
    """A network that always denoises to 0.5, in each of its ways of saying so."""
    family = FAMILIES["sd"]
    solver = make_solver(family)
    facts = {**family.facts, "prediction_type": prediction}
    scheduler = EPDScheduler.from_solver(Solver(solver.table, solver.sigmas, "ve", meta={"scheduler": facts}))
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - 0.5) / sigma[:, None, None, None]

    scheduler.set_timesteps()
    for i, t in enumerate(scheduler.timesteps):
        s = scheduler.sigmas[i]
        shown = scheduler.scale_model_input(x, t)
        unit = shown * (s**2 + 1).sqrt()
        assert torch.allclose(unit, x, rtol=1e-5)
        alpha, beta = 1 / (s**2 + 1).sqrt(), s / (s**2 + 1).sqrt()
        noise = (unit - 0.5) / s
        says = {"epsilon": noise, "sample": torch.full_like(x, 0.5), "v_prediction": alpha * noise - beta * 0.5}
        x = scheduler.step(says[prediction], t, x).prev_sample
    start = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * VE_SIGMAS[0]
    assert torch.allclose(x, solver.solve(drift, start), atol=1e-4)


def test_timesteps() -> None:
    sd = EPDScheduler.from_solver(make_solver(FAMILIES["sd"], scales=False))
    assert (sd.order, len(sd.timesteps), sd.init_noise_sigma) == (3, 9, VE_SIGMAS[0])
    assert sd.timesteps[0].item() == pytest.approx(999, abs=0.01)
    assert sd.timesteps[1].item() % 1 != 0 and bool((sd.timesteps.diff() < 0).all())
    flow = EPDScheduler.from_solver(make_solver(FAMILIES["sd3"], scales=False))
    assert torch.allclose(flow.timesteps[::3], 1000 * torch.tensor(FLOW_SIGMAS[:3])) and flow.init_noise_sigma == 1
    assert flow.sigmas[-1].item() == pytest.approx(FLOW_SIGMAS[-1]) and len(flow.sigmas) == 10
    assert len(EPDScheduler.from_solver(make_solver(FAMILIES["sd"], afs=True)).timesteps) == 8
    assert len(EPDScheduler.from_solver(make_solver(FAMILIES["sd3"], afs=True)).timesteps) == 9
    assert flow.config.use_flow_sigmas and not sd.config.use_flow_sigmas


def test_another_number_of_steps_is_reported_once(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    pipe.scheduler = EPDScheduler.from_solver(make_solver(family))
    with caplog.at_level(logging.WARNING, logger="epd_ray"):
        expected = call(pipe, family)
        assert not [r for r in caplog.records if r.name.startswith("epd_ray")]
        for _ in range(2):
            assert torch.equal(call(pipe, family, num_inference_steps=20), expected)
        assert torch.equal(call(pipe, family, sigmas=[1.0, 0.5], mu=1.0), expected)
    assert [r.message for r in caplog.records if r.name.startswith("epd_ray")] == [
        "num_inference_steps=20 is not used: this solver has 3 intervals of its own"
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipelines_default_number_of_steps_is_nobodys_wish(
    load: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, family = load(name), FAMILIES[name]
    pipe.scheduler = EPDScheduler.from_solver(make_solver(family))
    options = {k: v for k, v in family.options.items() if k != "guidance_scale"}
    with caplog.at_level(logging.WARNING, logger="epd_ray"):
        pipe("a red circle", **options)
        assert not [r.message for r in caplog.records if r.name.startswith("epd_ray")]
        pipe.scheduler.set_timesteps(50)  # nobody's default, outside of a pipeline
    assert "num_inference_steps=50 is not used" in caplog.text


@pytest.mark.parametrize(("made_for", "name"), [("flux", "sd3"), ("sd3", "flux"), ("sd", "sdxl"), ("sdxl", "sd")])
def test_a_table_of_another_model_is_warned_of_once(
    load: Any, made_for: str, name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    pipe, family = load(name), FAMILIES[name]
    with caplog.at_level(logging.WARNING, logger="epd_ray"):
        _of_family(make_solver(family), family.name).save_pretrained(tmp_path / "right")
        _of_family(make_solver(family), made_for).save_pretrained(tmp_path / "wrong")
        pipe.scheduler = EPDScheduler.from_pretrained(tmp_path / "right", like=pipe.scheduler)
        call(pipe, family)
        assert not [r.message for r in caplog.records if r.name.startswith("epd_ray")]
        pipe.scheduler = EPDScheduler.from_pretrained(tmp_path / "wrong", like=pipe.scheduler)
        for _ in range(2):
            call(pipe, family)
    (said,) = [r.message for r in caplog.records if r.name.startswith("epd_ray")]
    assert f"family {made_for}," in said and f"family {name}:" in said and family.pipeline.__name__ in said


def _of_family(solver: Solver, family: str) -> Solver:
    return Solver(
        solver.table, solver.sigmas, solver.form, solver.afs, solver.order, {**solver.meta, "backbone": family}
    )


# -- other schedulers after it ----------------------------------------------------------------------------------------

OTHERS = {
    "ve": (
        diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler, diffusers.DEISMultistepScheduler,
        diffusers.DDIMScheduler, diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler,
    ),
    "flow": (
        FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_other_schedulers_get_the_configuration_that_they_would_have_got_before(
    load: Any, name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    first = load(name).scheduler
    for theirs in (first, type(first)(**{k: v for k, v in first.config.items() if not k.startswith("_")})):
        scheduler = EPDScheduler.from_solver(make_solver(family, order=3), like=theirs)
        scheduler = EPDScheduler.from_solver(make_solver(family, order=3), like=scheduler)  # which knows the first one
        again = EPDScheduler.from_config(scheduler.config)
        assert (again.solver.order, again.form) == (3, family.form)
        scheduler.save_pretrained(tmp_path)
        read = EPDScheduler.from_pretrained(tmp_path)
        assert torch.equal(read.timesteps, scheduler.timesteps)
        for other in OTHERS[family.form]:
            expected = _sorted(dict(other.from_config(theirs.config).config))
            for after in (scheduler, again, read):
                assert _sorted(dict(other.from_config(after.config).config)) == expected, other.__name__


def _sorted(config: dict[str, Any]) -> dict[str, Any]:
    """Without the name and version that saving notes in any configuration."""
    plain = {name: value for name, value in config.items() if name not in ("_class_name", "_diffusers_version")}
    return plain | {"_use_default_values": sorted(config.get("_use_default_values", ()))}


def test_own_keys_are_no_other_schedulers() -> None:
    facts = {"prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
    own = EPDScheduler._get_init_keys(EPDScheduler) - facts - {"self", "use_flow_sigmas"}
    for other in vars(diffusers.schedulers).values():
        if isinstance(other, type) and issubclass(other, diffusers.SchedulerMixin):
            assert not own & EPDScheduler._get_init_keys(other), other.__name__


def _own(scheduler: EPDScheduler) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


# -- saved and read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd3"])
def test_a_solvers_directory_is_a_schedulers_too(tmp_path: Path, name: str) -> None:
    solver = make_solver(FAMILIES[name], afs=True, order=2)
    solver.save_pretrained(tmp_path / "run" / "solver")
    read = EPDScheduler.from_pretrained(tmp_path / "run" / "solver")
    assert _own(read) == _own(EPDScheduler.from_solver(solver))
    assert torch.equal(read.solver.table.positions, solver.table.positions)
    assert torch.equal(read.solver.sigmas, solver.sigmas) and read.solver.order == 2 and read.solver.afs
    assert torch.equal(EPDScheduler.from_pretrained(tmp_path / "run", subfolder="solver").timesteps, read.timesteps)
    read.save_pretrained(tmp_path / "again")
    again = EPDScheduler.from_pretrained(tmp_path / "again")
    assert torch.equal(again.timesteps, read.timesteps) and torch.equal(again.solver.sigmas, solver.sigmas)
    copied = EPDScheduler.from_config(again.config, afs=False)
    assert not copied.solver.afs and copied.config.use_flow_sigmas == (name == "sd3")
    file = json.loads((tmp_path / "again" / "scheduler_config.json").read_text())
    assert torch.equal(EPDScheduler(**file).timesteps, read.timesteps)
    older = {"solver_order": file.pop("multistep_order"), **{k: v for k, v in file.items() if k != "backbone"}}
    assert EPDScheduler.from_config(older).solver.order == 2


def test_reads_solvers_without_a_schedulers_file(tmp_path: Path) -> None:
    solver = make_solver(FAMILIES["sd"])
    path = solver.save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").unlink()
    assert EPDScheduler.from_pretrained(tmp_path).network.facts.prediction_type == "epsilon"
    solver.save_pretrained(tmp_path)
    Solver(solver.table, solver.sigmas, "ve").save_pretrained(tmp_path)  # the older configuration goes
    with pytest.raises(TableError, match=r"like=pipe\.scheduler"):
        EPDScheduler.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(TableError, match="No such file"):
        EPDScheduler.from_pretrained(tmp_path)


def test_reads_presets_and_hub_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = EPDScheduler.from_pretrained("sd3-1024-rl")
    assert preset.form == "flow" and preset.solver.table.intervals == 10
    path = make_solver(FAMILIES["sd"]).save_pretrained(tmp_path)
    asked: list[tuple[str, str | None]] = []

    def download(repo_id: str, filename: str, *, revision: str | None = None, **_: Any) -> str:
        asked.append((filename, revision))
        if not (path.parent / filename).is_file():
            raise OSError("no such entry")
        return str(path.parent / filename)

    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert EPDScheduler.from_pretrained("me/solver", revision="v1").form == "ve"
    (tmp_path / "scheduler_config.json").unlink()
    assert EPDScheduler.from_pretrained("me/solver", revision="v1").form == "ve"
    assert asked == [("scheduler_config.json", "v1"), ("scheduler_config.json", "v1"), ("solver.json", "v1")]
    with pytest.raises(TableError, match="preset"):
        EPDScheduler.from_pretrained("sd3-1024-lr")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_pipeline_keeps_it(load: Any, tmp_path: Path, name: str) -> None:
    pipe, family = load(name), FAMILIES[name]
    pipe.scheduler = EPDScheduler.from_solver(make_solver(family))
    expected = call(pipe, family)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is EPDScheduler and type(again) is family.pipeline
    assert torch.equal(call(again, family), expected)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_facts_come_from_a_pipelines_scheduler_where_meta_has_none(load: Any) -> None:
    family = FAMILIES["sd-v"]
    full = make_solver(family)
    bare = Solver(full.table, full.sigmas, "ve")
    with pytest.raises(TableError, match="predicts"):
        EPDScheduler.from_solver(bare)
    theirs = load("sd-v").scheduler
    expected = EPDScheduler.from_solver(full).network.facts
    assert EPDScheduler.from_solver(bare, like=theirs).network.facts == expected
    assert EPDScheduler.from_solver(full, like=theirs).network.facts == expected
    with pytest.raises(TableError, match=r"'v_prediction'.*'epsilon'"):
        EPDScheduler.from_solver(full, like=load("sd").scheduler)
    zero_snr = EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True)
    with pytest.raises(TableError, match="infinite sigma"):
        EPDScheduler.from_solver(bare, like=zero_snr)


def test_a_saved_solver_is_checked_against_the_pipelines_scheduler_too(tmp_path: Path) -> None:
    make_solver(FAMILIES["sd"]).save_pretrained(tmp_path)
    EPDScheduler.from_pretrained(tmp_path, like=EulerDiscreteScheduler(**BETAS))
    with pytest.raises(TableError, match="num_train_timesteps 1000"):
        EPDScheduler.from_pretrained(tmp_path, like=EulerDiscreteScheduler(**BETAS | {"num_train_timesteps": 500}))


def test_refuses_to_end_early(load: Any) -> None:
    pipe, family = load("sdxl"), FAMILIES["sdxl"]
    pipe.scheduler = EPDScheduler.from_solver(make_solver(family))
    expected = call(pipe, family)
    with pytest.raises(TableError, match=r"denoising_end is 0\.8, expected None"):
        call(pipe, family, denoising_end=0.8)
    assert torch.equal(call(pipe, family), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "linear"}, "beta_schedule 'scaled_linear', but this pipeline's is 'linear'"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 1000, but this pipeline's is 500"),
        ({"rescale_betas_zero_snr": True}, "infinite sigma"),
        ({"trained_betas": [0.001] * 1000}, "trained_betas, but this pipeline's differ"),
    ],
)
def test_refuses_a_pipeline_trained_in_another_way(change: dict[str, Any], message: str) -> None:
    solver = make_solver(FAMILIES["sd"])
    EPDScheduler.from_solver(solver, like=EulerDiscreteScheduler(**BETAS))
    with pytest.raises(TableError, match=message) as caught:
        EPDScheduler.from_solver(solver, like=EulerDiscreteScheduler(**{**BETAS, **change}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_equal_betas_in_other_words_are_the_same() -> None:
    betas = (torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2).tolist()
    EPDScheduler.from_solver(make_solver(FAMILIES["sd"]), like=EulerDiscreteScheduler(trained_betas=betas))


def test_refuses_the_other_kind_of_scheduler() -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    EPDScheduler.from_solver(make_solver(FAMILIES["sd3"]), like=flow)
    with pytest.raises(TableError, match="training betas"):
        EPDScheduler.from_solver(make_solver(FAMILIES["sd"]), like=flow)
    with pytest.raises(TableError, match="prediction_type 'epsilon'"):
        EPDScheduler.from_solver(make_solver(FAMILIES["sd3"]), like=EulerDiscreteScheduler(**BETAS))


def test_unconditional_solvers_leave_no_scheduler(tmp_path: Path) -> None:
    made = make_solver(FAMILIES["sd"])
    solver = Solver(made.table, made.sigmas, "ve", meta={**made.meta, "backbone": "ddpm", "prompted": False})
    solver.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "solver.json"]
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: unconditional-image-generation\n" in card and "solver.solve(drift, x)" in card
    assert not [
        word for word in ("red circle", "guidance)", "EPDScheduler", "parallelize", "diffusers,") if word in card
    ]
    pipe = DDPMPipeline.from_pretrained(save_ddpm(tmp_path / "ddpm"), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EPDScheduler.from_solver(solver)
    with pytest.raises(TableError, match="DDPMPipeline"):
        pipe()


def test_refuses_the_wrong_pipeline(load: Any) -> None:
    flow, ve = (EPDScheduler.from_solver(make_solver(FAMILIES[name])) for name in ("sd3", "sd"))
    for name in ("sd", "sdxl"):
        pipe = load(name)
        pipe.scheduler = flow
        with pytest.raises(TableError, match=r"flow model.*noise"):
            call(pipe, FAMILIES[name])
    for name in ("sd3", "flux"):
        pipe = load(name)
        pipe.scheduler = ve
        with pytest.raises(TableError, match="VE "):
            call(pipe, FAMILIES[name])


def test_refuses_misuse(load: Any) -> None:
    with pytest.raises(TableError, match="another scheduler"):
        EPDScheduler.from_config(load("sd").scheduler.config)
    scheduler = EPDScheduler.from_solver(make_solver(FAMILIES["sd3"]))
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(TableError, match=r"\b9 calls.*set_timesteps"):
        scheduler.step(x, 0, x)
    hand_over(scheduler, x, lambda latents: latents)
    with pytest.raises(TableError, match="all 9 calls are made"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps()
    with pytest.raises(TableError, match=r"\[2, 4, 2, 2\].*\[1, 4, 2, 2\]"):
        scheduler.step(x.repeat(2, 1, 1, 1), 0, x)
    with pytest.raises(TableError, match="begin_index is 2, expected 0"):
        scheduler.set_begin_index(2)
    scheduler.set_parallel(True)
    scheduler.set_timesteps()
    scheduler.step(x, 0, x)
    with pytest.raises(TableError, match="parallelize the pipeline"):
        scheduler.step(x.repeat(2, 1, 1, 1), 0, x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"form": "vp"}, TableError, "form is 'vp'"),
        ({"form": None}, TableError, "form is None"),
        ({"prediction_type": "flow_prediction"}, TableError, "does not go with prediction_type 'flow_prediction'"),
        ({"prediction_type": "noise"}, TableError, "scheduler.prediction_type"),
        ({"beta_start": None}, TableError, "beta_start, beta_end or beta_schedule is absent"),
        ({"beta_schedule": "wavy"}, TableError, "beta_schedule is 'wavy'"),
        ({"num_train_timesteps": 0}, TableError, "scheduler.num_train_timesteps"),
        ({"sigmas": [3.0, 4.0, 1.0, 0.1]}, ScheduleError, r"sigmas\[1\]"),
        ({"weights": [[0.5, 0.4]] * 3}, TableError, r"weights\[0\] sums to 0.9"),
        ({"multistep_order": 7}, TableError, "order is 7"),
    ],
)
def test_refuses_broken_configs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    config = dict(EPDScheduler.from_solver(make_solver(FAMILIES["sd"])).config)
    with pytest.raises(error, match=message) as caught:
        EPDScheduler(**{**config, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not valid JSON"),
        ("[" * 5000, "it is nested too deeply"),
        ("5", "is 5, expected an object"),  # which diffusers would seek on the hub
        ('{"sigmas": [], "sigmas": []}', "stands there twice"),
        ({"sigmas": "x"}, r"scheduler\.sigmas: .*given: 'x'"),
        ({"sigmas": [1.0, [0.5]]}, r"scheduler\.sigmas\.1"),
        ({"positions": {}}, r"scheduler\.positions"),
        ({"afs": "x"}, r"scheduler\.afs"),
        ({"replaced": 5}, r"scheduler\.replaced"),
        ({"replaced": {"_use_default_values": 5}}, r"_use_default_values is 5, expected a list of names"),
        ({"weights": [[0.5, 0.4]] * 3}, r"weights\[0\] sums to 0.9"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str | dict[str, Any], said: str) -> None:
    make_solver(FAMILIES["sd"]).save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    with pytest.raises(TableError, match=said) as caught:
        EPDScheduler.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_trained_betas_are_betas_enough() -> None:
    solver = make_solver(FAMILIES["sd"])
    betas = (torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2).tolist()
    facts = {"prediction_type": "epsilon", "trained_betas": betas}
    same = EPDScheduler.from_solver(Solver(solver.table, solver.sigmas, "ve", meta={"scheduler": facts}))
    assert torch.allclose(same.timesteps, EPDScheduler.from_solver(solver).timesteps, atol=1e-3)


# -- the hub ----------------------------------------------------------------------------------------------------------


class FakeApi:
    """What HfApi would have been asked."""

    def __init__(self, uploads: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.uploads, self.error, self.token = uploads, error, None

    def __call__(self, token: str | None) -> "FakeApi":
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        if self.error is not None:
            raise self.error
        assert exist_ok
        self.uploads.append({"private": private, "token": self.token})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        files = {file.name: file.read_text() for file in folder_path.iterdir()}
        self.uploads.append({"repo_id": repo_id, "files": files, "message": commit_message})


def rewarded(name: str = "sd3") -> Solver:
    solver = make_solver(FAMILIES[name])
    meta = {
        **solver.meta, "backbone": name, "resolution": 512, "rewards_before": {"clip": 0.25, "hps": 0.28},
        "rewards_after": {"clip": 0.3, "hps": 0.29}, "validation_reward": 0.3125, "note": "a | b",
    }  # fmt: skip
    return Solver(solver.table, solver.sigmas, solver.form, meta=meta)


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uploads: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi(uploads))
    solver = rewarded()
    assert solver.push_to_hub("me/fast", token="secret", private=True).endswith("me/fast")
    made, pushed = uploads
    assert made == {"private": True, "token": "secret"}
    assert pushed["repo_id"] == "me/fast" and pushed["message"] == "Upload a learned diffusion solver"
    solver.save_pretrained(tmp_path)
    local = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(local) == {"README.md", "scheduler_config.json", "solver.json"}
    assert pushed["files"] == {**local, "README.md": local["README.md"].replace("path/to/this/directory", "me/fast")}


def test_local_paths_are_not_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m" / "sd").mkdir(parents=True)
    made = make_solver(FAMILIES["sd"])
    for model in (str(tmp_path / "m" / "sd"), "/home/me/sd", "m/sd", "./m/sd"):
        uploads: list[dict[str, Any]] = []
        monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi(uploads))
        solver = Solver(made.table, made.sigmas, "ve", meta={**made.meta, "model_id": model})
        solver.push_to_hub("me/fast", token="secret")
        files = uploads[1]["files"]
        assert json.loads(files["solver.json"])["meta"]["model_id"] == "sd" and "base_model" not in files["README.md"]
        assert not [name for name, text in files.items() if model in text]
        assert f"model_id is published as 'sd': {model!r}" in caplog.messages[-1]
        solver.save_pretrained(tmp_path / "kept")
        assert Solver.from_pretrained(tmp_path / "kept").meta["model_id"] == model
        assert "base_model" not in (tmp_path / "kept" / "README.md").read_text()


@pytest.mark.parametrize(("revision", "named"), [(None, False), ("0123abc", True)])
def test_a_run_without_a_revision_was_on_a_directory(revision: str | None, named: bool) -> None:
    made = make_solver(FAMILIES["sd"])
    solver = Solver(made.table, made.sigmas, "ve", meta={**made.meta, "revision": revision})
    assert ("base_model: tiny/sd\n" in solver.card("x", has_scheduler=True)) is named


def test_a_card_of_a_lone_start_point() -> None:
    solver = make_solver(FAMILIES["sd3"], points=1, start_point=True)
    assert solver.table.scale_dir is not None
    card = solver.card("me/fast", has_scheduler=True)
    assert "3 intervals with one point each: parallel NFE 3 " in card
    assert all(f" | 0.0000 | 1.0000 | {scale:.4f} | " in card for scale in solver.table.scale_dir[:, 0].tolist())


def test_card() -> None:
    card = rewarded().card("me/fast", has_scheduler=True)
    assert card.startswith("---\nlibrary_name: epd-ray\npipeline_tag: text-to-image\ntags: [diffusers, ")
    for line in (
        "base_model: tiny/sd3",
        "3 intervals with 2 parallel points each: parallel NFE 6 (calls that wait for each other),",
        "9 evaluations per image in all, 9 network passes, or 18 with classifier-free guidance.",
        'pipe = DiffusionPipeline.from_pretrained("tiny/sd3")',
        'pipe.scheduler = EPDScheduler.from_pretrained("me/fast", like=pipe.scheduler)',
        'image = pipe("a red circle", num_inference_steps=3, guidance_scale=4.5).images[0]',
        'pipe = parallelize(pipe, "me/fast")  # devices=["cuda:0", "cuda:1"]',
        'solver = Solver.from_pretrained("me/fast")',
        "| resolution | `512` |",
        "| Interval (sigma) | Positions | Weights | Direction scales | Time scales |\n|---|---|---|---|---|\n",
        "| validation_reward | `0.3125` |",
        '| note | `"a \\| b"` |',
        "| hps | 0.28 | 0.29 |",
    ):
        assert f"\n{line}" in card, line
    plain = make_solver(FAMILIES["sd"]).card("x", has_scheduler=False)
    assert "EPDScheduler" not in plain and "diffusers, " not in plain and "Mean reward" not in plain


def http_error(status: int) -> HfHubHTTPError:
    import httpx2

    request = httpx2.Request("POST", "https://hub/api/repos/create")
    return HfHubHTTPError(
        f"{status} Client Error. (Request ID: 1)\n\nThe reason.", response=httpx2.Response(status, request=request)
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(401), r"'me/fast' cannot be written: The reason\. .*pass token="),
        (http_error(403), r"The reason\. .*use an owner that you may write to"),
        (http_error(500), r"The reason\.$"),
        (ConnectionError("no route"), "no route .is the hub reachable"),
    ],
)
def test_push_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi([], error))
    with pytest.raises(TableError, match=message) as caught:
        rewarded().push_to_hub("me/fast", token="secret")
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_push_needs_a_token_and_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(TableError, match="HF_TOKEN"):
        rewarded().push_to_hub("me/fast")
    with pytest.raises(TableError, match="a hub id is 'owner/name'"):
        rewarded().push_to_hub("me/too/deep", token="secret")
