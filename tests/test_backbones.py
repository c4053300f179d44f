"""Every family of pipelines against diffusers' own calls."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.models.autoencoders.vq_model import VectorQuantizer
from torch import Tensor

from epd_ray.backbones.discrete import DiscreteTime
from epd_ray.backbones.flow import flow_sigmas
from epd_ray.backbones.index import SAMPLE, fingerprint, read_index
from epd_ray.drawing.sampler import Sampler, baseline
from epd_ray.errors import ModelError
from epd_ray.solvers import SolverTable
from epd_ray.solvers.conditioned import noises
from epd_ray.solvers.epd import epd
from tests import tiny_models
from tests.families import (
    FREE,
    MODELS,
    ONE_OF_EACH,
    PROMPTS,
    SEEDS,
    T5,
    UNCONDITIONAL,
    Calls,
    backbones,
    denoiser,
    edit,
    folder,
    load,
    run,
)
from tests.tiny_models import TOKENS

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_sd15_schedule.json").read_text())


def pipeline_images(name: str, folder: Path, steps: int, guidance_scale: float) -> Tensor:
    """What diffusers' own call gives from the same seeds, with a scheduler that is Euler."""
    absent = dict.fromkeys(T5) if name in ("sd3", "sd3_dynamic") else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **absent)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    if name in UNCONDITIONAL:
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
        images = [
            pipeline(batch_size=1, num_inference_steps=steps, generator=g, output_type="np").images for g in generators
        ]
        return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
    if name.startswith("sd") and not name.startswith("sd3"):
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    more = {"max_sequence_length": TOKENS} if name.startswith(("sd3", "flux")) else {}
    images = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, height=16, width=16,
        output_type="pt", **more,
    ).images  # fmt: skip
    assert isinstance(images, Tensor)
    return images


# The pixel models start at sigma = 157, and a random network leaves pictures 100 times as bright: 1e-4 of that.
TOLERANCE = dict.fromkeys(MODELS, 1e-5) | {"ddpm": 1e-2, "ddpm_sample": 1e-4, "ldm": 1e-4}
PARITY = [(name, steps, g) for name in MODELS for steps, g in ((5, 1.0), (4, 7.5)) if name not in UNCONDITIONAL]
PARITY += [(name, steps, 1.0) for name in sorted(UNCONDITIONAL) for steps in (5, 8)]  # DDIM steps by 1000 // N


@pytest.mark.parametrize(("name", "steps", "guidance_scale"), PARITY)
def test_euler_is_the_pipelines_own_output(
    name: str, steps: int, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A code that flips for a difference in the last bits would hide what is measured.
    monkeypatch.setattr(VectorQuantizer, "forward", lambda _, latents: (latents, torch.zeros(()), None))
    backbone = backbones(name)
    with Calls(denoiser(backbone)) as calls:
        images = backbone.decode(run(backbone, baseline("euler@model", steps), guidance_scale))
    halves = 2 if name in FREE and guidance_scale > 1 else 1
    assert calls.batches == [2 * halves] * steps
    theirs = pipeline_images(name, folder(name), steps, guidance_scale)
    assert images.shape == theirs.shape == (2, 3, 16, 16)
    assert (images - theirs).abs().max() < TOLERANCE[name]
    assert theirs.std() > 0.05 and (theirs[0] - theirs[1]).abs().max() > 0.1


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_an_empty_prompt_is_a_text_of_its_own(guidance_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL embeds no negative prompt as zeros, but the prompt "" by its text encoders."""
    monkeypatch.setattr("tests.test_backbones.PROMPTS", ["", PROMPTS[1]])
    backbone = backbones("sdxl")
    assert backbone.pipeline.config.force_zeros_for_empty_prompt
    conditioning = backbone.encode(["", PROMPTS[1]], guidance_scale)
    assert conditioning.tensors[0][-2:].abs().amax((1, 2)).min() > 0
    assert guidance_scale == 1.0 or conditioning.tensors[0][:2].abs().max() == 0
    images = backbone.decode(baseline("euler@model", 3).run(backbone, conditioning, noises(backbone, SEEDS)))
    theirs = pipeline_images("sdxl", folder("sdxl"), 3, guidance_scale)
    assert (images - theirs).abs().max() < TOLERANCE["sdxl"]


def test_latents_are_decoded_as_the_vqvae_does() -> None:
    backbone = backbones("ldm")
    vqvae, latents = backbone.pipeline.vqvae, noises(backbone, SEEDS)
    theirs = (vqvae.decode(latents / vqvae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(backbone.decode(latents), theirs)


def test_an_unnamed_scaling_factor_is_one(tmp_path: Path) -> None:
    model = tiny_models.save_ldm(tmp_path / "ldm")
    config = json.loads((model / "vqvae/config.json").read_text())
    assert config.pop("scaling_factor") == 0.18215  # the class default
    (model / "vqvae/config.json").write_text(json.dumps(config))
    backbone = load(model)
    latents = noises(backbone, SEEDS)
    theirs = (backbone.pipeline.vqvae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(backbone.decode(latents), theirs)
    assert not torch.equal(theirs, backbones("ldm").decode(latents))


def test_a_learned_variance_is_dropped(tmp_path: Path) -> None:
    learned = DDPMScheduler(variance_type="learned_range")
    both = load(tiny_models.save_ddpm(tmp_path / "both", scheduler=learned, out_channels=6))
    mean = load(tiny_models.save_ddpm(tmp_path / "mean"))
    mean.pipeline.unet.load_state_dict(
        {k: v[:3] if k.startswith("conv_out") else v for k, v in both.pipeline.unet.state_dict().items()}
    )
    ours, theirs = (run(backbone, baseline("euler", 3), 1.0) for backbone in (both, mean))
    assert ours.shape == (2, 3, 16, 16) and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"num_class_embeds": 10}, "is conditioned on classes: give one that is unconditional"),
        ({"class_embed_type": "timestep"}, "is conditioned on classes: give one that is unconditional"),
        ({"out_channels": 6}, "gives 6 channels for 3, with variance_type 'fixed_small'"),
    ],
)
def test_pixel_models_that_cannot_be_driven(network: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_models.save_ddpm(tmp_path / "m", **network)
    with pytest.raises(ModelError, match=f"model '{model}' {message}"):
        load(model)


def test_usual_guidance() -> None:
    usual = {name: backbones(name).default_guidance for name in ("sd", "sdxl", "sd3", "flux", "ddpm", "ldm")}
    assert usual == {"sd": 7.5, "sdxl": 5.0, "sd3": 4.5, "flux": 3.5, "ddpm": 1.0, "ldm": 1.0}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - UNCONDITIONAL))
def test_prompts_and_guidance_matter(name: str) -> None:
    backbone = backbones(name)
    noise = noises(backbone, SEEDS)
    x, sigma = backbone.initial(noise), torch.full((2,), float(backbone.sigmas(4)[1]))
    plain, guided = (backbone.drift(x, sigma, backbone.encode(PROMPTS, g)) for g in (1.0, 7.0))
    swapped = backbone.drift(x, sigma, backbone.encode(PROMPTS[::-1], 1.0))
    assert (plain - swapped).abs().max() > 1e-3
    assert ((plain - guided).abs().max() > 1e-3) == (name != "flux_schnell")  # the distilled one knows no scale


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_points_in_one_batch_are_points_one_by_one(name: str, guidance_scale: float) -> None:
    backbone = backbones(name)
    table = SolverTable(
        torch.tensor([[0.3, 0.8], [0.2, 0.6]]), torch.tensor([[0.4, 0.6], [0.7, 0.3]]),
        scale_time=torch.tensor([[1.0, 1.01], [0.99, 1.0]]),
    )  # fmt: skip
    sampler = Sampler("epd", 2, "epd", "EPD", table)
    with Calls(denoiser(backbone)) as calls:
        together = run(backbone, sampler, guidance_scale)
    halves = 2 if name in FREE and guidance_scale > 1 else 1
    assert calls.batches == [2 * halves, 4 * halves] * 2  # B, then B * K, per interval
    assert sum(calls.batches) == 2 * sampler.cost.network_passes(guidance_scale, backbone.classifier_free)
    assert sum(calls.batches) == 2 * halves * sampler.model_evals and len(calls.batches) == sampler.parallel_nfe

    def one_by_one(x: Tensor, sigma: Tensor) -> Tensor:
        copies = len(x) // len(PROMPTS)
        rows = [
            backbone.drift(x[i : i + 1], sigma[i : i + 1], backbone.encode([PROMPTS[i // copies]], guidance_scale))
            for i in range(len(x))
        ]
        return torch.cat(rows)

    x = backbone.initial(noises(backbone, SEEDS))
    apart = epd(one_by_one, x, backbone.sigmas(2), table, form=backbone.form)
    assert torch.allclose(together, apart, rtol=1e-5, atol=1e-5 * float(x.std()))


@pytest.mark.parametrize("name", ["sd3_t5", "sdxl"])
def test_repeat_keeps_each_half_together(name: str) -> None:
    backbone = backbones(name)
    single = backbone.encode(PROMPTS, 7.0)
    repeated = single.repeat(2)
    assert (len(single), len(repeated)) == (2, 4)
    for one, many in zip(single.tensors, repeated.tensors, strict=True):
        assert torch.equal(many, one[[0, 0, 1, 1, 2, 2, 3, 3]])


# ---- sigmas and timesteps


def test_sd_timesteps_are_fractional_and_the_references() -> None:
    backbone, golden = backbones("sd"), GOLDEN["sigma_to_network_timestep"]
    sigma = torch.tensor(golden["sigma"])
    x = backbone.noise(0).expand(len(sigma), -1, -1, -1)
    with Calls(denoiser(backbone)) as calls:
        backbone.drift(x, sigma, backbone.encode(["a"] * len(sigma), 1.0))
    assert calls.timesteps[0].dtype == torch.float32
    assert torch.allclose(calls.timesteps[0], torch.tensor(golden["timestep"]), rtol=0, atol=2e-3)
    scaled = x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()
    assert torch.allclose(calls.first[0], scaled, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", GOLDEN["schedules"], ids=lambda case: str(case["num_sigmas"]))
def test_sd_sigmas_are_the_references(case: dict[str, Any]) -> None:
    sigmas = backbones("sd").sigmas(case["num_sigmas"] - 1)
    # diffusers keeps the betas in float32
    assert torch.allclose(sigmas, torch.tensor(case["sigmas"]).double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["sd", "ldm"])
def test_sigmas_to_zero_are_those_of_euler_discrete(name: str) -> None:
    backbone = backbones(name)
    scheduler = EulerDiscreteScheduler.from_config(backbone.pipeline.scheduler.config, timestep_spacing="trailing")
    for count in (*range(1, 33), 50, 100, 999, 1000):
        scheduler.set_timesteps(count)
        assert torch.allclose(backbone.sigmas(count, final_zero=True).float(), scheduler.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("name", "factor"), [("sd3", 1000.0), ("flux", 1.0)])
def test_flow_timesteps(name: str, factor: float) -> None:
    backbone, sigma = backbones(name), torch.tensor([0.9, 0.1234])
    with Calls(denoiser(backbone)) as calls:
        backbone.drift(backbone.initial(noises(backbone, SEEDS)), sigma, backbone.encode(PROMPTS, 1.0))
    assert torch.equal(calls.timesteps[0], factor * sigma)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_sd3_sigmas_are_the_schedulers_own(count: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(count + 1)
    assert torch.equal(backbones("sd3").sigmas(count), scheduler.sigmas[:-1].double())
    scheduler.set_timesteps(count)
    assert torch.equal(backbones("sd3").sigmas(count, final_zero=True), scheduler.sigmas.double())


def test_published_grids() -> None:
    sd3 = flow_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, False, 4096)
    assert sd3.dtype == torch.float64 and len(sd3) == 11
    assert sd3[[0, 1, 9, 10]].tolist() == pytest.approx([1.0, 0.96440, 0.25559, 0.008929], abs=1e-5)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, shift=3.0,
        use_dynamic_shifting=True,
    )  # fmt: skip
    flux = flow_sigmas(scheduler, 10, False, 4096, own_grid=True)  # 1024 px: mu = 1.15
    assert float(flux[0]) == 1 and float(flux[-1]) == pytest.approx(0.00315, abs=5e-6)
    own = flow_sigmas(scheduler, 8, True, 4096, own_grid=True)
    assert float(own[-1]) == 0 and float(own[-2]) == pytest.approx(np.exp(1.15) / (np.exp(1.15) + 8 - 1), rel=1e-6)
    assert float(flow_sigmas(scheduler, 10, False, 256)[5]) < float(flux[5])  # fewer tokens, less shift


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "velocity"}, "predicts 'velocity', expected one of epsilon, v_prediction, sample"),
        ({"rescale_betas_zero_snr": True}, "starts at infinite sigma"),
    ],
)
def test_schedules_that_cannot_be_driven(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"model 'm' {message}"):
        DiscreteTime(EulerDiscreteScheduler.from_config(EulerDiscreteScheduler().config, **changes), "m")


def test_schedules_that_are_none() -> None:
    with pytest.raises(ModelError, match=r"'m'.*alphas_cumprod.*at least 2"):
        DiscreteTime(DDPMScheduler(trained_betas=[0.0, 0.1]), "m")


def test_timesteps_wait_for_no_device() -> None:
    time = DiscreteTime(DDPMScheduler(), "m")
    timestep = time.timestep(torch.ones(2, device="meta"))  # which has no values to look at
    assert timestep.device.type == "meta" and timestep.dtype == torch.float32


def test_timesteps_are_copied_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    time = DiscreteTime(DDPMScheduler(), "m")
    time.timestep(torch.ones(2, device="meta"))
    monkeypatch.setattr(Tensor, "to", lambda *_, **__: pytest.fail("copied again"))
    time.timestep(torch.ones(2, device="meta"))


class OnMps:
    """A sigma where float64 is unknown: nothing works but to bring it here."""

    device = torch.device("mps")

    def cpu(self) -> Tensor:
        return torch.tensor([0.5, 3.0])


def test_timesteps_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    time = DiscreteTime(DDPMScheduler(), "m")
    moved: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "to", lambda tensor, device: moved.append((device, tensor.dtype)) or tensor)
        timestep = time.timestep(OnMps())  # type: ignore[arg-type]
    assert moved == [(torch.device("mps"), torch.float32)]
    assert torch.equal(timestep, time.timestep(torch.tensor([0.5, 3.0])))


@pytest.mark.parametrize(
    ("name", "scheduler", "message"),
    [
        (
            "sd",
            FlowMatchEulerDiscreteScheduler(),
            "MatchEulerDiscreteScheduler, expected one with training betas",
        ),
        ("sd3", FlowMatchHeunDiscreteScheduler(), "expected a FlowMatchEulerDiscreteScheduler"),
        ("flux", EulerDiscreteScheduler(), "has a EulerDiscreteScheduler, expected a FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_foreign_schedulers_are_refused(name: str, scheduler: Any, message: str, tmp_path: Path) -> None:
    model = MODELS[name](tmp_path / "model")
    scheduler.save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    edit(model / "model_index.json", scheduler=[index["scheduler"][0], type(scheduler).__name__])
    with pytest.raises(ModelError, match=message) as caught:
        load(model)
    assert str(model) in str(caught.value)


# ---- gradients


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_drift_is_differentiable_though_weights_are_frozen(name: str) -> None:
    backbone = backbones(name)
    conditioning = backbone.encode(PROMPTS, 3.0)
    for tensor in (*conditioning.tensors, *backbone.embeddings(PROMPTS[:1])[0]):
        assert not tensor.requires_grad and not tensor.is_inference()
    assert not any(p.requires_grad for p in denoiser(backbone).parameters())
    generator = torch.Generator().manual_seed(5)
    x = noises(backbone, SEEDS)
    x = backbone.initial(x) / backbone.initial(x).std()
    sigma = torch.tensor([0.62, 0.31])
    probe, direction = (torch.randn(x.shape, generator=generator) for _ in range(2))

    def value(x: Tensor, sigma: Tensor) -> Tensor:
        return (backbone.drift(x, sigma, conditioning).double() * probe).sum()

    x_leaf, sigma_leaf = x.clone().requires_grad_(), sigma.clone().requires_grad_()
    grad_x, grad_sigma = torch.autograd.grad(value(x_leaf, sigma_leaf), (x_leaf, sigma_leaf))
    with torch.no_grad():
        h = 1e-2
        numeric = (value(x + h * direction, sigma) - value(x - h * direction, sigma)) / (2 * h)
        assert float((grad_x * direction).sum()) == pytest.approx(float(numeric), rel=2e-2)
        h = 2e-4
        for row in range(2):
            step = h * torch.nn.functional.one_hot(torch.tensor(row), 2)
            numeric = (value(x, sigma + step) - value(x, sigma - step)) / (2 * h)
            # the float32 noise of the difference: a larger step leaves the straight piece between two timesteps
            assert float(grad_sigma[row]) == pytest.approx(float(numeric), rel=5e-2, abs=0.1)
    assert grad_sigma.abs().min() > 0.2  # not within the tolerance of nothing


# ---- dtypes


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_half_precision_stops_at_the_networks_door(name: str) -> None:
    backbone = load(folder(name), dtype="bfloat16")
    assert {p.dtype for p in denoiser(backbone).parameters()} == {torch.bfloat16}
    with Calls(denoiser(backbone)) as calls:
        x = run(backbone, baseline("dpm2", 4), 7.0)
    assert {first.dtype for first in calls.first} == {torch.bfloat16}
    d = backbone.drift(
        backbone.initial(noises(backbone, SEEDS)), torch.full((2,), 0.9), backbone.encode(PROMPTS, 7.0)
    )  # fmt: skip
    assert d.dtype == torch.float32
    assert torch.equal(d, d.bfloat16().float()) == (name not in FREE - {"sd_v"} and name != "sd_v")  # guided in float32
    assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
    assert backbone.decode(x).dtype == torch.float32


def test_float16_leaves_in_float32_what_overflows(tmp_path: Path) -> None:
    backbone = load(folder("sd3_t5"), dtype="float16")
    t5 = dict(backbone.pipeline.text_encoder_3.named_parameters())
    assert {p.dtype for n, p in t5.items() if ".wo." in n} == {torch.float32}
    assert {p.dtype for n, p in t5.items() if ".wo." not in n} == {torch.float16}
    assert {p.dtype for p in denoiser(backbone).parameters()} == {torch.float16}
    model = tiny_models.save_sd(tmp_path / "sd")
    assert load(model, dtype="float16").pipeline.vae.dtype == torch.float16
    edit(model / "vae/config.json", force_upcast=True)
    upcast = load(model, dtype="float16")
    assert upcast.pipeline.vae.dtype == torch.float32 and upcast.pipeline.unet.dtype == torch.float16
    assert upcast.decode(upcast.noise(0)[None]).isfinite().all()


# ---- a whole iteration


@pytest.fixture
def opened(build: Any) -> Iterator[Callable[[str], Any]]:
    def make(name: str) -> Any:
        return build(
            "backbone.family=auto", f"backbone.model={folder(name)}", "backbone.resolution=16",
            "backbone.dtype=float32", "backbone.device=cpu", f"backbone.max_sequence_length={TOKENS}",
            "solver.intervals=2", "rdpo.prompts_per_iteration=2", "rdpo.group_size=2", "rdpo.minibatch_size=4",
        )  # fmt: skip

    yield make


OFTEN = ("sd", "sd3_t5", "flux", "ddpm")


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.nightly) for n in ONE_OF_EACH])
def test_one_iteration(name: str, opened: Callable[[str], Any]) -> None:
    algo = opened(name)
    before = algo.checksum()
    algo.train()
    rows = [rollout.record() for rollout in algo.last.rollouts]
    assert len(rows) == 4 and len({row["prompt"] for row in rows}) == 2
    assert all(np.isfinite(row["reward"]) for row in rows) and len({row["reward"] for row in rows}) == 4
    assert algo.checksum() != before  # it learned something


# -- which model it is -------------------------------------------------------------------------------------------------


def test_another_shift_is_another_model(tmp_path: Path) -> None:
    """The sigmas follow from it, and so what every baseline draws."""
    model = tiny_models.save_sd3(tmp_path / "sd3")
    before = read_index(str(model), None).fingerprint
    edit(model / "scheduler" / "scheduler_config.json", shift=3.0)
    assert read_index(str(model), None).fingerprint != before


@pytest.mark.parametrize("place", [0, SAMPLE - 1, -1, -SAMPLE])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_head_and_tail_of_large_weights_count(tmp_path: Path, place: int, suffix: str) -> None:
    data = bytearray(3 << 20)
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    before = fingerprint(tmp_path)
    data[place] = 1
    path.write_bytes(data)
    assert fingerprint(tmp_path) != before
