"""Every method of the zoo: its cost, its order, and the library's own run of it."""

import importlib.util
import inspect
import sys
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from epd_ray.backbones.gaussian import GaussianBackbone
from epd_ray.drawing.sampler import Sampler, baseline, nearest_baseline, scheduled, schedules_for
from epd_ray.errors import ConfigError, ScheduleError, TableError, UnknownNameError
from epd_ray.evaluation.comparison import rivals
from epd_ray.solvers import Form, dpm2_table, edm, heun, zoo
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.solvers.schedule_names import MODEL, SCHEDULES
from epd_ray.solvers.schedulers import deis, dpmpp, unipc
from epd_ray.solvers.schedules import check_sigmas, logsnr
from tests.families import PROMPTS, SEEDS, backbones, folder
from tests.tiny_models import TOKENS

FORMS: tuple[Form, ...] = ("ve", "flow")
EVERY = [(name, form) for form in FORMS for name in zoo.applicable(form)]
LIBRARIES = {"dpmpp": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler, "deis": DEISMultistepScheduler}


def grid(name: str, form: Form, intervals: int) -> Tensor:
    """From the far end of the form to the last sigma that the method asks for."""
    inner = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.03]) if form == "flow" else logsnr(6, 0.02, 80.0)
    last = 0.0 if zoo.find(name).ends_at_zero else 1e-3
    steps = torch.linspace(0, 5, intervals).floor().long() if intervals <= 6 else None
    middle = inner[steps] if steps is not None else torch.linspace(inner[0], inner[-1], intervals)
    return torch.cat([middle, torch.tensor([last])]).double()


START = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    """A bounded drift that is non-linear in x and sigma, sample by sample."""
    return torch.sin(x + sigma.reshape(-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize("intervals", [1, 2, 4, 17])
@pytest.mark.parametrize(("name", "form"), EVERY)
def test_contract(name: str, form: Form, intervals: int) -> None:
    method, sigmas = zoo.find(name), grid(name, form, intervals)
    for shape, dtype in (((2,), torch.float64), ((2, 3), torch.float32), ((2, 4, 2, 3), torch.float32)):
        calls: list[Tensor] = []
        states: list[tuple[int, float, Tensor]] = []

        def drift(x: Tensor, sigma: Tensor, calls: list[Tensor] = calls) -> Tensor:
            assert sigma.shape == x.shape[:1] and sigma.dtype == x.dtype
            calls.append(sigma)
            return curved(x, sigma)

        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        before = x.clone()
        end = zoo.follow(name, drift, x, sigmas, form, callback=lambda *seen, s=states: s.append(seen))
        assert len(calls) == method.parallel_nfe(intervals) == sum(len(c) == 2 for c in calls)
        assert end.shape == shape and end.dtype == dtype and bool(end.isfinite().all())
        assert torch.equal(x, before) and torch.equal(states[-1][2], end)
        assert [i for i, _, _ in states] == list(range(intervals))
        assert [s for _, s, _ in states] == pytest.approx(sigmas[1:].tolist(), rel=1e-9)
        assert calls[0].tolist() == pytest.approx([sigmas[0].item()] * 2) and min(c.min() for c in calls) > 0
        alone = zoo.follow(name, drift, x[1:], sigmas, form)
        assert torch.allclose(alone, end[1:], rtol=1e-5, atol=1e-5)


# Each method's order where its coefficients hold (see `uniform`), by a drift that is still at both ends, so that the
# lower orders there do not count. UniPC's corrector adds one. DPM-Solver++ 3M, in diffusers and in skrample, is a
# second-order method with a smaller constant: its second difference is half of the second derivative.
ORDERS = {
    "euler": 1, "euler_no_zero": 1, "heun": 2, "dpm2": 2, "ipndm": 4, "ipndm2": 2, "ipndm3": 3, "dpmpp2m": 2,
    "dpmpp3m": 2,
    "unipc": 3, "unipc3": 4, "deis": 2, "deis3": 3, "skrample_dpm2": 2, "skrample_dpm3": 2, "skrample_adams2": 2,
    "skrample_adams3": 3, "skrample_adams4": 4, "skrample_unip2": 2, "skrample_unip3": 3, "skrample_unipc2": 3,
    "skrample_unipc3": 4, "skrample_rk2": 2, "skrample_rk3": 3, "skrample_rk4": 4,
}  # fmt: skip
ENDS: dict[Form, tuple[float, float]] = {"ve": (2.0, 0.7), "flow": (0.8, 0.4)}


def uniform(name: str, form: Form, intervals: int) -> Tensor:
    """A grid that is uniform in sigma, 1 / sigma or log SNR, whichever the coefficients are made for."""
    high, low = torch.tensor(ENDS[form], dtype=torch.float64)
    share = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    if name.startswith(("ipndm", "euler")):
        return high + share * (low - high)
    if "adams" in name:
        return 1 / (1 / high + share * (1 / low - 1 / high))
    if form == "ve":
        return high * (low / high) ** share
    return torch.sigmoid(high.logit() + share * (low.logit() - high.logit()))


def still_at_both_ends(form: Form) -> Any:
    high, low = ENDS[form]

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        share = (sigma.reshape(-1, 1) - low) / (high - low)
        return 2.5 / (high - low) * (4 * share * (1 - share)) ** 6 * torch.cos(x + share)

    return drift


@cache
def solution(form: Form, steps: int = 2000) -> Tensor:
    """By the classical Runge-Kutta method in tiny steps."""
    drift, x = still_at_both_ends(form), START
    for a, b in pairwise(torch.linspace(*ENDS[form], steps + 1, dtype=torch.float64).split(1)):
        k1 = drift(x, a)
        k2 = drift(x + (b - a) / 2 * k1, (a + b) / 2)
        k3 = drift(x + (b - a) / 2 * k2, (a + b) / 2)
        x = x + (b - a) / 6 * (k1 + 2 * k2 + 2 * k3 + drift(x + (b - a) * k3, b))
    return x


@pytest.mark.parametrize(("name", "form"), [case for case in EVERY if case[0] not in ("edm", "kdpm2")])
def test_order(name: str, form: Form) -> None:
    drift, counts = still_at_both_ends(form), (48, 96, 192)
    ends = [zoo.follow(name, drift, START, uniform(name, form, n), form) for n in counts]
    errors = torch.stack([(end - solution(form)).abs().max() for end in ends])
    n, e = torch.tensor(counts).double().log(), errors.log()
    slope = -((n - n.mean()) * (e - e.mean())).sum() / ((n - n.mean()) ** 2).sum()
    assert slope.item() == pytest.approx(ORDERS[name], abs=0.4)


def test_edm_is_heun_and_a_step_to_zero() -> None:
    sigmas = logsnr(9, 0.1, 10.0)
    to_zero = edm(curved, START, torch.cat([sigmas, torch.zeros(1)]))
    last = heun(curved, START, sigmas)
    assert torch.allclose(
        to_zero, last - 0.1 * curved(last, torch.full((2,), 0.1, dtype=torch.float64)), rtol=0, atol=1e-12
    )
    with pytest.raises(ScheduleError, match=r"sigmas\[8\] is 0.1, expected 0"):
        edm(curved, START, sigmas)


@pytest.mark.parametrize(("name", "form"), EVERY)
def test_gaussians_are_solved(name: str, form: Form) -> None:
    """On every schedule that applies, with many steps, each method ends near the exact solution."""
    backbone = GaussianBackbone(form=form, std=0.5, size=2, sigma_min=0.02, sigma_max=10 if form == "ve" else None)
    conditioning, noise = backbone.encode(PROMPTS, 1.0), noises(backbone, SEEDS)
    assert name in zoo.applicable(backbone.form)
    for schedule in schedules_for(backbone):
        sampler = nearest_baseline(name if schedule == MODEL else f"{name}@{schedule}", 60)
        sigmas = scheduled(backbone, sampler.intervals, schedule, final_zero=zoo.find(name).ends_at_zero)
        check_sigmas(sigmas, allow_zero=zoo.find(name).ends_at_zero)
        assert sigmas[0] == backbone.sigmas(1)[0] and len(sigmas) == sampler.intervals + 1
        exact = backbone.exact(backbone.initial(noise), sigmas[0].item(), sigmas[-1].item(), conditioning)
        error = (sampler.run(backbone, conditioning, noise) - exact).abs().max().item()
        assert error < (0.2 if schedule == "time_uniform" or name == "euler" else 0.05), schedule


@pytest.mark.parametrize("order", [0, 4])
@pytest.mark.parametrize("solve", [dpmpp, unipc, deis])
def test_orders_that_diffusers_lacks(solve: Any, order: int) -> None:
    with pytest.raises(TableError, match=f"order is {order}, .*1, 2 or 3"):
        solve(curved, START, torch.tensor([1.0, 0.5]), form="ve", order=order)


def test_deis_keeps_its_precision_at_the_start_of_a_flow() -> None:
    """Where it divides by 1 - sigma."""
    sigmas, x = torch.tensor([1.0, 0.9, 0.5, 0.1]).double(), torch.randn(2, 50, generator=torch.Generator())
    single, double = (zoo.follow("deis3", curved, state, sigmas, "flow") for state in (x, x.double()))
    assert single.dtype == torch.float32 and (single - double).abs().max() < 1e-5


# -- the libraries' own runs ------------------------------------------------------------------------------------------


def exact_timesteps(scheduler: type) -> type:
    """The pipelines cut a flow's timesteps to whole numbers; our networks see 1000 * sigma."""

    class Exact(scheduler):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps = 1000 * self.sigmas[:-1]

    return Exact


@cache
def pipeline_of(name: str) -> tuple[Any, Any]:
    """A pipeline, and the configuration of the scheduler that it comes with."""
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if name in ("sd3", "sd3_dynamic") else {}
    pipeline = DiffusionPipeline.from_pretrained(folder(name), low_cpu_mem_usage=False, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler.config


def by_the_pipeline(name: str, scheduler: type, steps: int, noise: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """diffusers' own call with a scheduler made by from_config: the scheduler, and the latents that it ends at."""
    pipeline, config = pipeline_of(name)
    if scheduler in LIBRARIES.values() and backbones(name).form == "flow":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config["shift"]}
        pipeline.scheduler = exact_timesteps(scheduler).from_config(config, **{**flow, **options})
    else:
        pipeline.scheduler = scheduler.from_config(config, **options)
    more = {"max_sequence_length": TOKENS} if backbones(name).form == "flow" else {}
    latents = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=3.0, latents=noise, height=16, width=16,
        output_type="latent", **more,
    ).images  # fmt: skip
    return pipeline.scheduler, latents


@pytest.mark.parametrize("name", ["dpmpp2m", "dpmpp3m", "unipc", "unipc3", "deis", "deis3"])
@pytest.mark.parametrize("model", ["sd", "sd_v", "sd3", "flux"])
def test_equals_the_pipeline_with_that_scheduler(model: str, name: str) -> None:
    method, backbone = zoo.find(name), backbones(model)
    library, order = LIBRARIES[method.target.partition(":")[2]], int(method.options["order"])
    flow = backbone.form == "flow"
    # In flow form diffusers' DEIS repeats its last sigma, an interval of no length; from 15 on none is of lower order.
    steps = 16 if flow and library is DEISMultistepScheduler else 5
    noise = noises(backbone, SEEDS)
    # The pipelines begin at unit variance, x / sqrt(1 + sigma^2), whatever the first sigma.
    start = backbone.initial(noise) if flow else noise
    spacing = {} if flow else {"timestep_spacing": "trailing"}
    scheduler, theirs = by_the_pipeline(model, library, steps, start, solver_order=order, **spacing)
    sigmas = scheduler.sigmas.double()
    scale = 1.0 if flow else (1 + sigmas[[0, -1]] ** 2).sqrt()
    sigmas = sigmas[:-1] if sigmas[-1] == sigmas[-2] else sigmas
    if not flow:
        noise = noise * (scale[0] / backbone.sigmas(1)[0]).float()
    ours = Sampler(name, len(sigmas) - 1, "t", "t", sigmas=tuple(sigmas.tolist()))
    x = ours.run(backbone, backbone.encode(PROMPTS, 3.0), noise)
    x = x if flow else x / scale[1].float()
    assert x.shape == theirs.shape and theirs.std() > 0.1
    # In float32 theirs loses digits where DEIS divides by 1 - sigma = 0.001; ours is float64 there.
    tolerance = 5e-5 if flow and library is DEISMultistepScheduler else 1e-5
    assert (x - theirs).abs().max() < tolerance * theirs.abs().max().clamp(min=1)


# A method as it comes, the pipeline's scheduler with which it is the same, and the pipelines that can run that one.
# Diffusers' Euler, Heun and KDPM2 tell a network fractional timesteps, interpolated by another rule than ours, so the
# numbers of steps are such that all timesteps are whole numbers, which 4 of the spacing linspace are.
VE, FLOWS = ("sd", "sd_v", "sdxl"), ("sd3", "sd3_dynamic", "flux")
AS_IT_COMES = [
    *((model, name, 4) for model in VE for name in ("euler", "edm", "kdpm2")),
    *(("sd", name, 5) for name in ("deis", "deis3")),
    *((model, name, 5) for model in ("sd", *FLOWS) for name in ("dpmpp2m", "dpmpp3m", "unipc", "unipc3")),
    *((model, "euler", 5) for model in FLOWS),
    ("sd3", "edm", 4),
]


@pytest.mark.parametrize(("model", "name", "steps"), AS_IT_COMES)
def test_a_method_as_it_comes_is_the_pipeline_with_its_scheduler(model: str, name: str, steps: int) -> None:
    method, backbone = zoo.find(name), backbones(model)
    library = getattr(diffusers, method.schedulers[backbone.form])
    options = {"solver_order": method.options["order"]} if method.takes_options else {}
    noise = noises(backbone, SEEDS)
    latents = backbone.initial(noise) if backbone.form == "flow" else noise
    _, theirs = by_the_pipeline(model, library, steps, latents, **options)
    sampler = baseline(name, method.parallel_nfe(steps))
    x = sampler.run(backbone, backbone.encode(PROMPTS, 3.0), noise)
    last = sampler.steps(backbone)[-1].item()
    x = x / (1 + last**2) ** 0.5  # DEIS ends above 0, in the scale of unit variance
    assert x.shape == theirs.shape and theirs.std() > 0.1
    tolerance = 5e-5 if name == "kdpm2" else 1e-5  # its inner timesteps are no whole numbers
    assert (x - theirs).abs().max() < tolerance * theirs.abs().max().clamp(min=1)


def test_own_grids_that_a_flow_does_not_have() -> None:
    """IPNDM and KDPM2 know no flow; DEIS repeats the last sigma, so that an interval has no length."""
    flow = backbones("sd3")
    scheduler = DEISMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    scheduler.set_timesteps(6)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2] == pytest.approx(0.2855, abs=1e-4)
    for name in ("deis", "ipndm", "kdpm2", "heun", "dpm2"):
        method, sampler = zoo.find(name), nearest_baseline(name, 6)
        assert "flow" not in method.schedulers
        models = flow.sigmas(sampler.intervals, final_zero=method.ends_at_zero)
        assert torch.equal(sampler.steps(flow), models)
    assert not {"use_flow_sigmas", "flow_shift"} & set(inspect.signature(diffusers.KDPM2DiscreteScheduler).parameters)
    ipndm = diffusers.IPNDMScheduler()
    ipndm.set_timesteps(6)
    assert ipndm.timesteps.max() <= 1


def test_own_grids_that_are_known() -> None:
    """What the multistep schedulers make of a flow shifted by 2, and what the pipeline's own scheduler makes."""
    flow = backbones("sd3")
    steps = {name: baseline(name, 6).steps(flow).tolist() for name in ("dpmpp2m", "unipc", "euler")}
    assert steps["dpmpp2m"] == pytest.approx([0.9995, 0.9086, 0.7995, 0.6662, 0.4996, 0.2855, 0], abs=1e-4)
    assert steps["unipc"] == pytest.approx([1, 0.9092, 0.8002, 0.6671, 0.5005, 0.2864, 0], abs=2e-3)
    assert steps["euler"] == flow.sigmas(6, final_zero=True).tolist() == baseline("unipc@model", 6).steps(flow).tolist()
    assert baseline("dpmpp2m?shift=1", 6).steps(flow)[1].item() == pytest.approx(0.8325)
    assert baseline("dpmpp2m?flow_shift=1", 6) == baseline("dpmpp2m?shift=1", 6)
    assert baseline("heun?shift=1", 6).steps(flow).tolist() == pytest.approx([1, 0.667, 0.334, 0.001], abs=2e-3)
    assert baseline("euler?shift=5", 6).steps(backbones("flux"))[1].item() == pytest.approx(25 / 26, abs=1e-3)


def test_published_grids() -> None:
    from diffusers.schedulers import AysSchedules

    for model, table in (("sd", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas")):
        assert baseline("dpmpp2m@ays", 10).steps(backbones(model)).tolist() == pytest.approx(AysSchedules[table])
    assert baseline("euler@ays", 19).steps(backbones("sd"))[1].item() == pytest.approx((14.615 * 6.475) ** 0.5)
    with pytest.raises(ScheduleError, match="'ays' is not published for model"):
        baseline("euler@ays", 10).steps(backbones("ddpm"))


@pytest.mark.parametrize("name", ["dpmpp2m", "unipc"])
@pytest.mark.parametrize("steps", [4, 7])
def test_the_models_own_schedule_is_the_pipelines(name: str, steps: int) -> None:
    backbone, library = backbones("sd"), LIBRARIES[zoo.find(name).target.partition(":")[2]]
    scheduler = library.from_config(backbone.pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert torch.allclose(scheduler.sigmas.double(), backbone.sigmas(steps, final_zero=True), rtol=1e-4)


def test_equals_skramples_own_run() -> None:
    pytest.importorskip("skrample", reason="needs Python 3.12")
    from skrample.sampling import models, structured
    from skrample.sampling.interface import StructuredFunctionalAdapter
    from skrample.scheduling import Linear, Scaled

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, form in product(("DPM", "Adams", "UniP", "UniPC"), FORMS):
        schedule = Linear() if form == "flow" else Scaled()
        transform = models.FlowModel() if form == "flow" else models.NoiseModel()
        points = schedule.schedule(6)
        scales = {p.sigma: 1.0 if form == "flow" else p.alpha for p in points}  # theirs is in VP form

        def model(z: Tensor, timestep: float, sigma: float, alpha: float, scales: Any = scales) -> Tensor:
            return curved(z / scales[sigma], torch.full((2,), sigma / scales[sigma], dtype=torch.float64))

        adapter = StructuredFunctionalAdapter(getattr(structured, name)(order=3))
        theirs = adapter.sample_model(scales[points[0].sigma] * x, model, transform, schedule, 6)
        sigmas = torch.tensor([*(p.sigma / scales[p.sigma] for p in points), 0.0], dtype=torch.float64)
        ours = zoo.follow(f"skrample_{name.lower()}3", curved, x, sigmas, form)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9), (name, form)


# -- names and costs --------------------------------------------------------------------------------------------------


def test_every_name_has_its_order_and_label() -> None:
    assert set(ORDERS) | {"edm", "kdpm2"} == set(zoo.METHODS)
    assert len({method.label for method in zoo.METHODS.values()}) == len(zoo.METHODS)
    assert set(zoo.ALIASES.values()) <= set(zoo.METHODS) and not set(zoo.ALIASES) & set(zoo.METHODS)
    assert {"euler", "dpmpp2m", "deis"} <= set(zoo.applicable("flow")) <= set(zoo.applicable("flow", installed=False))
    assert len(zoo.applicable("ve", installed=False)) == len(zoo.METHODS)


@pytest.mark.parametrize("name", zoo.METHODS)
def test_costs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.Method, "installed", True)
    method = zoo.METHODS[name]
    for cost in range(1, 14):
        sampler = nearest_baseline(name, cost)
        assert sampler.parallel_nfe == sampler.model_evals == method.parallel_nfe(sampler.intervals) >= cost
        assert sampler.intervals == 1 or method.parallel_nfe(sampler.intervals - 1) < cost
        assert sampler == baseline(name, sampler.parallel_nfe)


@pytest.mark.parametrize(
    ("name", "cost", "possible"), [("heun", 7, "6 or 8"), ("edm", 6, "5 or 7"), ("dpm2", 1, "2"), ("edm", 0, "1")]
)
def test_impossible_costs_are_explained(name: str, cost: int, possible: str) -> None:
    with pytest.raises(ValueError, match=rf"{cost} .*{possible}"):
        baseline(name, cost)


def test_rivals_cost_no_less() -> None:
    ours = Sampler("epd", 3, "t", "t", dpm2_table(3), afs=True)
    found = rivals(["euler", "ddim", "heun", "edm", "ipndm4"], ours, equal_evals=True)
    assert [s.key for s in found] == ["euler-5", "heun-6", "edm-5", "ipndm-5"]
    assert [s.key for s in rivals(["edm", "heun"], nearest_baseline("euler", 6), equal_evals=False)] == [
        "edm-7",
        "heun-6",
    ]


def test_keys_and_labels() -> None:
    sampler = baseline("heun@logsnr", 6)
    assert (sampler.key, sampler.label, sampler.schedule) == ("heun-logsnr-6", "Heun (logsnr)", "logsnr")
    sampler = baseline("ipndm3@shift", 6, final_zero=False)
    assert (sampler.key, sampler.ends_at_zero) == ("ipndm3-shift-no-zero-6", False)
    assert sampler.label == "iPNDM (order 3) (shift) without the step to 0"
    assert baseline("heun", 6, final_zero=False).key == "heun-6"  # it never has that step
    sampler = baseline("dpm2", 5, afs=True)
    assert (sampler.key, sampler.intervals, sampler.model_evals) == ("dpm2-afs-5", 3, 5)
    assert baseline("ipndm1", 4) == baseline("euler", 4) == baseline("ddim", 4)
    assert baseline("euler", 4).key == "euler-4" and baseline("euler", 4).label == "DDIM / Euler"


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match=r"'unipcc'.*'unipc'"):
        baseline("unipcc", 4)
    with pytest.raises(UnknownNameError, match=r"'logsnrr'.*'logsnr'"):
        baseline("euler@logsnrr", 4)
    with pytest.raises(UnknownNameError, match="cannot be imported"):
        baseline("no_such_module:solve", 4)


def test_schedules_have_forms_too() -> None:
    zoo.require_form(["heun@logsnr", "euler@polynomial", "euler"], "ve")
    with pytest.raises(ConfigError, match=r"'heun@logsnr'.* ve, .* flow"):
        zoo.require_form(["heun", "heun@logsnr"], "flow")


def test_without_the_step_to_zero_a_method_stops_before_it() -> None:
    """The same evaluations on the pipelines' sigmas but the last, and on as many of which the last is above 0."""
    backbone = GaussianBackbone(form="ve", std=0.5, size=2)
    conditioning, noise = backbone.encode(PROMPTS, 1.0), noises(backbone, SEEDS)
    for name in ("euler", "ipndm3", "dpmpp3m", "unipc3"):
        sampler = baseline(f"{name}@logsnr", 5, final_zero=False)
        sigmas = scheduled(backbone, 5, "logsnr", final_zero=False)
        expected = zoo.follow(
            name, ConditionedDrift(backbone, conditioning), backbone.initial(noise), sigmas, backbone.form
        )
        assert sigmas[-1] > 0 and torch.equal(sampler.run(backbone, conditioning, noise), expected)
        assert not torch.equal(baseline(f"{name}@logsnr", 5).run(backbone, conditioning, noise), expected)
    assert torch.equal(
        baseline("euler", 4, final_zero=False).run(backbone, conditioning, noise),
        baseline("euler_no_zero", 4).run(backbone, conditioning, noise),
    )


@pytest.mark.parametrize("form", FORMS)
def test_any_method_may_begin_analytically(form: Form) -> None:
    backbone = GaussianBackbone(form=form, std=0.5, size=2)
    conditioning, noise = backbone.encode(PROMPTS, 1.0), noises(backbone, SEEDS)
    ours = baseline("dpm2", 5, afs=True)
    as_table = Sampler("epd", 3, "t", "t", dpm2_table(3), afs=True)
    assert ours.parallel_nfe == as_table.parallel_nfe == 5
    assert torch.allclose(ours.run(backbone, conditioning, noise), as_table.run(backbone, conditioning, noise))
    assert not torch.allclose(
        ours.run(backbone, conditioning, noise), baseline("dpm2", 6).run(backbone, conditioning, noise)
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not any(name.startswith("skrample") for name in zoo.applicable("ve"))
    line = r"solver 'skrample_rk4': the package skrample is not installed: pip install 'epd-ray\[skrample\]'"
    with pytest.raises(ConfigError, match=line):
        baseline("skrample_rk4", 8)


def test_ones_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_methods.py").write_text(
        "from epd_ray.solvers import euler, heun\n"
        "from epd_ray.solvers.zoo import Method\n"
        "def twice(drift, x, sigmas, *, callback=None):\n    return heun(drift, x, sigmas, callback=callback)\n"
        "TWICE = Method('Mine', 'my_methods:twice', evals=2, forms=('ve',))\n"
        "def once(drift, x, sigmas, *, callback=None):\n    return euler(drift, x, sigmas, callback=callback)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    once, twice = baseline("my_methods:once", 3), baseline("my_methods:TWICE", 6)
    assert (once.label, once.key, once.intervals) == ("once", "my_methods.once-3", 3)
    assert (twice.label, twice.key, twice.intervals) == ("Mine", "my_methods.TWICE-6", 3)
    ve, flow = GaussianBackbone(form="ve", size=2), GaussianBackbone(form="flow", size=2)
    conditioning, noise = ve.encode(PROMPTS, 1.0), noises(ve, SEEDS)
    assert torch.equal(twice.run(ve, conditioning, noise), baseline("heun", 6).run(ve, conditioning, noise))
    assert once.run(flow, conditioning, noise).isfinite().all()
    with pytest.raises(ConfigError, match=r"'my_methods:TWICE'.* ve, .* flow"):
        twice.run(flow, conditioning, noise)


def test_schedules_belong_to_forms() -> None:
    ve, flow, sd = GaussianBackbone(form="ve"), GaussianBackbone(form="flow"), backbones("sd")
    assert schedules_for(ve) == ["model", "logsnr", "time_uniform"]  # its own is polynomial
    assert schedules_for(flow) == schedules_for(backbones("sd3")) == ["model"]  # its own is shift
    assert schedules_for(sd) == ["model", "polynomial", "logsnr", "time_uniform"]  # its own is uniform
    for backbone, own in ((ve, "polynomial"), (flow, "shift"), (sd, "uniform")):
        assert torch.equal(scheduled(backbone, 4, own, final_zero=True), backbone.sigmas(4, final_zero=True))
    assert set(SCHEDULES.values()) == set(FORMS)
    for backbone, name in ((flow, "logsnr"), (ve, "uniform"), (ve, "shift"), (sd, "shift")):
        with pytest.raises(ScheduleError, match=rf"'{name}'.* model"):
            scheduled(backbone, 4, name, final_zero=False)
    assert scheduled(sd, 3, "logsnr", final_zero=True).tolist()[2:] == pytest.approx([sd.sigmas(1)[1].item(), 0.0])
