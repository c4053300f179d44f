"""Pipelines that no adapter knows, driven through their own call: against diffusers, for every class of tiny ones."""

import copy
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxInpaintPipeline,
    SchedulerMixin,
)
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from torch import Tensor

from epd_ray.backbones.auto import open_backbone
from epd_ray.backbones.clock import Seen, read_clock
from epd_ray.backbones.driver import DrivenBackbone, open_driven
from epd_ray.backbones.loading import PipelineOptions
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.drawing.sampler import EPD, Sampler, baseline
from epd_ray.errors import ModelError, TableError
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.conditioned import noises
from tests import tiny_pipelines
from tests.families import PROMPTS, SEEDS, edit, folder, run
from tests.families import backbones as adapters
from tests.tiny_models import TOKENS
from tests.tiny_pipelines import BUILDERS, CALLS, PIXELS, make

DISCRETE = {"pixart"}


def drive(pipeline: Any, name: str, **call: Any) -> DrivenBackbone:
    options = PipelineOptions(
        model=name, device="cpu", dtype="float32", resolution=PIXELS[name], max_sequence_length=TOKENS
    )
    return DrivenBackbone(pipeline, options, {**CALLS.get(name, {}), **call})


@cache
def driven(name: str) -> DrivenBackbone:
    """A pipeline under the driver; not to be changed."""
    return drive(make(name), name)


def own_pictures(name: str, scheduler: Any, steps: int, guidance_scale: float) -> Tensor:
    """The pipeline's own pictures from the same seeds."""
    pipeline = copy.copy(driven(name).pipeline)
    pipeline.scheduler = scheduler
    how: dict[str, Any] = {"guidance_scale": guidance_scale}
    if name == "qwen_image":
        how = {"true_cfg_scale": guidance_scale, "negative_prompt": [" ", " "]}
    if name == "hunyuan_image":
        how, pipeline.guider = {}, ClassifierFreeGuidance(guidance_scale=guidance_scale)
    if name in ("wan", "wan22", "ltx"):
        how["num_frames"] = 1
    how = {"max_sequence_length": TOKENS, **how, **CALLS.get(name, {})}
    if name == "hunyuan_image":
        del how["max_sequence_length"]
    pictures = pipeline(
        prompt=list(PROMPTS), num_inference_steps=steps, height=PIXELS[name], width=PIXELS[name], output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], return_dict=False, **how,
    )[0]  # fmt: skip
    assert isinstance(pictures, Tensor)
    return pictures[:, 0] if pictures.ndim == 5 else pictures


def euler_scheduler(name: str) -> Any:
    own = driven(name).pipeline.scheduler
    if name in DISCRETE:
        return EulerDiscreteScheduler.from_config(own.config, timestep_spacing="trailing")
    return FlowMatchEulerDiscreteScheduler(shift=3.0) if name == "sana" else own


@pytest.mark.parametrize("name", BUILDERS)
def test_euler_is_the_pipelines_own_picture(name: str) -> None:
    backbone = driven(name)
    sampler = baseline("euler@model" if name in DISCRETE else "euler", 3)
    ours = backbone.decode(run(backbone, sampler, 5.0))
    theirs = own_pictures(name, euler_scheduler(name), 3, 5.0)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5
    assert theirs.std() > 0.02 and (theirs[0] - theirs[1]).abs().max() > 0.05
    unguided = backbone.decode(run(backbone, sampler, 1.0))
    assert (unguided - ours).abs().max() > 1e-4  # the prompt and its weight arrive


def table(batch: int | None = None) -> SolverTable:
    positions = torch.tensor([[[0.2, 0.7], [0.3, 0.8]], [[0.4, 0.9], [0.1, 0.6]]])
    weights = torch.tensor([[[0.3, 0.7], [0.6, 0.4]], [[0.5, 0.5], [0.8, 0.2]]])
    scales = torch.tensor([[[1.02, 0.97], [1.01, 0.99]], [[0.98, 1.0], [0.97, 1.03]]])
    rows = SolverTable(positions, weights, scales, None)
    return rows if batch is None else SolverTable(positions[batch], weights[batch], scales[batch], None)


def epd(solver_table: SolverTable) -> Sampler:
    return Sampler(EPD, 2, "epd", "EPD", solver_table)


@pytest.mark.parametrize("name", BUILDERS)
def test_each_picture_has_a_table_of_its_own(name: str) -> None:
    """Every row is told its own times: together they are what each is under its table alone."""
    backbone = driven(name)
    own = run(backbone, epd(table()), 5.0)
    for row in range(2):
        alone = run(backbone, epd(table(row)), 5.0)
        assert (own[row] - alone[row]).abs().max() < 1e-4
        assert (own[1 - row] - alone[1 - row]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in BUILDERS if n != "cogview4"])
def test_the_scheduler_draws_the_same_in_the_unmodified_pipeline(name: str) -> None:
    backbone = driven(name)
    solver = Solver(table(0), backbone.sigmas(2), backbone.form, meta={"scheduler": backbone.facts["scheduler"]})
    theirs = own_pictures(name, EPDScheduler.from_solver(solver, like=backbone.pipeline.scheduler), 2, 5.0)
    ours = backbone.decode(run(backbone, epd(table(0)), 5.0))
    assert (ours - theirs).abs().max() < 1e-4


def test_a_time_that_is_not_sigma_is_refused_by_the_pipeline_itself() -> None:
    """CogView4 tells its network the time before the shift, which no scheduler for flows knows."""
    backbone = driven("cogview4")
    solver = Solver(table(0), backbone.sigmas(2), "flow", meta={"scheduler": backbone.facts["scheduler"]})
    with pytest.raises(TableError, match=r"timesteps are given, expected none: .*CogView4Pipeline"):
        own_pictures("cogview4", EPDScheduler.from_solver(solver), 2, 5.0)


def test_rows_on_both_sides_of_a_boundary_ask_a_network_each() -> None:
    backbone = driven("wan22")
    conditioning = backbone.encode(PROMPTS, 5.0)
    x = backbone.initial(noises(backbone, SEEDS))
    levels = torch.tensor([[0.9, 0.9], [0.8, 0.8], [0.9, 0.8]])
    high, low, both = (backbone.drift(x, sigma, conditioning) for sigma in levels)
    assert torch.equal(both, torch.stack([high[0], low[1]]))
    first, second = (drive(part, "wan") for part in halves(backbone.pipeline))
    for ours, alone, sigma in ((high, first, 0.9), (low, second, 0.8)):
        theirs = alone.drift(x, torch.full((2,), sigma), alone.encode(PROMPTS, 5.0))
        assert torch.equal(ours, theirs)


def halves(pipeline: Any) -> list[Any]:
    """Pipelines of one network each."""
    found = []
    for network in (pipeline.transformer, pipeline.transformer_2):
        half = copy.copy(pipeline)
        half.transformer, half.transformer_2 = network, None
        half.register_to_config(boundary_ratio=None)
        found.append(half)
    return found


# ---- against the adapters


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("sd", "sdxl")), "sd3_t5", "flux"])
def test_drifts_are_those_of_the_adapters(name: str) -> None:
    adapter = adapters(name)
    driver = open_driven(
        model=str(folder(name)), device="cpu", dtype="float32", resolution=16, max_sequence_length=TOKENS
    )
    assert driver.classifier_free == adapter.classifier_free and driver.form == adapter.form
    assert driver.facts | {"fingerprint": 0} == adapter.facts | {"fingerprint": 0}
    assert torch.equal(driver.sigmas(3, final_zero=True), adapter.sigmas(3, final_zero=True))
    assert driver.shift == adapter.shift
    x = driver.initial(noises(driver, SEEDS))
    assert torch.equal(x, adapter.initial(noises(adapter, SEEDS)))
    sigma = torch.tensor([5.0, 1.0] if driver.form == "ve" else [0.9, 0.4])
    answers = []
    for backbone in (driver, adapter):
        leaves = x.clone().requires_grad_(), sigma.clone().requires_grad_()
        drift = backbone.drift(*leaves, backbone.encode(PROMPTS, 5.0))
        answers.append((drift, *torch.autograd.grad(drift.sin().sum(), leaves)))
    for ours, theirs in zip(*answers, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * max(1.0, float(theirs.abs().max()))
    assert torch.equal(driver.decode(x), adapter.decode(x))


# ---- calls of the pipeline


def calls_open() -> int:
    return sum(thread.name == "pipeline call" for thread in threading.enumerate())


def test_a_call_ends_with_its_conditioning() -> None:
    backbone = driven("z_image")
    before = calls_open()
    conditioning = backbone.encode(PROMPTS, 5.0)
    repeated = conditioning.repeat(3)
    assert calls_open() == before + 1 and len(repeated) == 6
    del conditioning, repeated
    end = time.monotonic() + 5
    while calls_open() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert calls_open() == before


def test_a_call_that_has_no_steps_left_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = driven("z_image")
    expected = run(backbone, baseline("heun", 8), 5.0)
    monkeypatch.setattr("epd_ray.backbones.driver.LIMIT", 3)
    assert torch.equal(run(backbone, baseline("heun", 8), 5.0), expected)


def test_calls_side_by_side_do_not_see_each_other() -> None:
    backbone = driven("chroma")
    x, sigma = backbone.initial(noises(backbone, SEEDS)), torch.tensor([0.9, 0.4])
    alone = [backbone.drift(x, sigma, backbone.encode(PROMPTS, scale)) for scale in (1.0, 5.0)]
    both = [backbone.encode(PROMPTS, scale) for scale in (1.0, 5.0)]
    for _ in range(2):
        for conditioning, expected in zip(both, alone, strict=True):
            assert torch.equal(backbone.drift(x, sigma, conditioning), expected)
    assert isinstance(backbone.pipeline.scheduler, SchedulerMixin)  # the pipeline itself is as it was


def test_an_error_of_the_network_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = driven("chroma")
    conditioning = backbone.encode(PROMPTS, 1.0)
    with pytest.raises(RuntimeError):
        backbone.drift(torch.zeros(2, 16, 5), torch.tensor([0.9, 0.4]), conditioning)


def test_a_negative_prompt_and_a_size() -> None:
    backbone = drive(driven("qwen_image").pipeline, "qwen_image", negative_prompt="blue", height=16, width=32)
    assert (backbone.facts["resolution"], backbone.facts["size"]) == (None, "32x16")
    latents = run(backbone, baseline("euler", 2), 5.0)
    assert backbone.decode(latents).shape == (2, 3, 16, 32)
    other = drive(driven("qwen_image").pipeline, "qwen_image", negative_prompt="star", height=16, width=32)
    assert (run(other, baseline("euler", 2), 5.0) - latents).abs().max() > 1e-4


# ---- opened by name, and in a whole iteration


def test_auto_drives_a_pipeline_that_no_adapter_knows(tmp_path: Path) -> None:
    model = tiny_pipelines.save("z_image", tmp_path / "z_image")
    options = {"device": "cpu", "dtype": "float32", "resolution": 16, "max_sequence_length": TOKENS}
    backbone = open_backbone(model=str(model), **options)
    assert isinstance(backbone, DrivenBackbone) and backbone.family == "ZImagePipeline"
    sampler = baseline("euler", 2)
    assert torch.equal(run(backbone, sampler, 5.0), run(driven("z_image"), sampler, 5.0))
    assert len(str(backbone.facts["fingerprint"])) == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z_image", "chroma"])
def test_one_iteration(name: str, build: Any, tmp_path: Path) -> None:
    algo = build(
        "backbone.family=pipeline", f"backbone.model={tiny_pipelines.save(name, tmp_path / name)}",
        "backbone.resolution=16", "backbone.dtype=float32", "backbone.device=cpu",
        f"backbone.max_sequence_length={TOKENS}", "backbone.options={negative_prompt: blue}",
        "solver.intervals=2", "rdpo.prompts_per_iteration=2", "rdpo.group_size=2", "rdpo.minibatch_size=4",
    )  # fmt: skip
    before = algo.checksum()
    algo.train()
    rows = [rollout.record() for rollout in algo.last.rollouts]
    assert len(rows) == 4 and len({row["reward"] for row in rows}) == 4
    assert algo.checksum() != before


# ---- refused


LATENTS = torch.arange(8.0).reshape(2, 4)


def seen_at(t: float, **arguments: Any) -> list[Seen]:
    return [Seen({"hidden_states": LATENTS, "timestep": torch.full((2,), t / 1000), **arguments}, 2)]


REFUSED: dict[str, tuple[Callable[[float], list[Seen]], str]] = {
    "no argument": (lambda t: [Seen({"hidden_states": LATENTS}, 2)], "no argument of its network follows"),
    "no line": (lambda t: seen_at(t, r=torch.tensor(t * t)), r"argument r .* 1e\+06, 250000 and 62500 .* not a \* t"),
    "no number": (lambda t: seen_at(t, mask=LATENTS * t), "argument mask .* changes with time and is no number"),
    "no pictures": (
        lambda t: [Seen({"hidden_states": torch.zeros(3, 4), "timestep": torch.tensor(t)}, 3)], "rows .* not its pict",
    ),
    "another order": (
        lambda t: [Seen({"hidden_states": LATENTS.repeat_interleave(2, 0), "timestep": torch.tensor(t)}, 4)],
        "rows .* not its pictures",
    ),
    "no latents": (
        lambda t: [Seen({"hidden_states": torch.zeros(2, 4), "timestep": torch.tensor(t)}, 2)], "is not its latents",
    ),
    "two ways": (lambda t: [*seen_at(t), *seen_at(2 * t)], "told the time in several ways"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_that_is_told_the_time_in_an_unknown_way_is_refused(case: str) -> None:
    calls, why = REFUSED[case]
    timesteps = [1000.0, 500.0, 250.0]
    with pytest.raises(ModelError, match=f"a model: .*{why}.*: write an adapter for it"):
        read_clock("a model", 2, [calls(t) for t in timesteps], timesteps, (LATENTS,), 2)


def test_times_go_to_their_rows() -> None:
    timesteps = [1000.0, 500.0, 250.0]
    twice = torch.cat([LATENTS, LATENTS])  # guidance repeats the batch
    calls = [[Seen({"x": list(twice), "t": 1 - t / 1000, "tokens": torch.full((4, 3), t)}, 4)] for t in timesteps]
    clock = read_clock("a model", 2, calls, timesteps, ([torch.ones(5)] * 4,), 4)
    assert clock.arguments == (("t", -0.001, 1.0), ("tokens", 1.0, 0.0))
    arguments = dict(calls[0][0].arguments)
    clock.tell(arguments, torch.tensor([900.0, 100.0]))
    assert torch.allclose(arguments["t"], torch.tensor([0.1, 0.9, 0.1, 0.9]))
    assert torch.equal(arguments["tokens"], torch.tensor([900.0, 100.0, 900.0, 100.0])[:, None].expand(4, 3))
    assert [len(part) for part in clock.blank({"x": list(LATENTS)})] == [2]


def test_a_modular_pipeline_draws_as_by_itself() -> None:
    from diffusers.modular_pipelines import ZImageAutoBlocks

    parts = {name: part for name, part in driven("z_image").pipeline.components.items()}
    pipeline = ZImageAutoBlocks().init_pipeline()
    pipeline.update_components(**parts, guider=ClassifierFreeGuidance(guidance_scale=5.0))
    pipeline.set_progress_bar_config(disable=True)
    backbone = drive(pipeline, "z_image")
    assert backbone.classifier_free and backbone.default_guidance == 5.0
    ours = backbone.decode(run(backbone, baseline("euler", 3), 5.0))
    theirs = pipeline(
        prompt=list(PROMPTS), num_inference_steps=3, height=16, width=16, output="images", output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], max_sequence_length=TOKENS,
    )  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-5 and theirs.std() > 0.02
    own = run(backbone, epd(table()), 5.0)
    assert (own[0] - run(backbone, epd(table(0)), 5.0)[0]).abs().max() < 1e-4


def test_a_guider_that_counts_steps_is_refused() -> None:
    pipeline = make("hunyuan_image")
    pipeline.guider = AdaptiveProjectedGuidance()
    with pytest.raises(ModelError, match="AdaptiveProjectedGuidance, goes by the number of the step"):
        drive(pipeline, "hunyuan_image")


def test_an_argument_of_the_call_that_is_ours_or_unknown_is_refused() -> None:
    for name in ("latents", "negativ_prompt"):
        with pytest.raises(ModelError, match=f"takes no argument {name} from outside, expected one of .*negative_pr"):
            drive(driven("qwen_image").pipeline, "qwen_image", **{name: None})


def test_a_size_that_the_pipeline_cannot_have_is_told_in_its_words() -> None:
    with pytest.raises(ModelError, match=r"it refuses its call .*Height must be divisible by 4"):
        drive(driven("z_image").pipeline, "z_image", height=15)


def test_pipelines_that_need_more_than_a_prompt_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    index.write_text("{}")
    for name, why in ((FluxInpaintPipeline.__name__, r"more than a prompt \(strength\)"), ("NoPipeline", "not have")):
        edit(index, _class_name=name)
        with pytest.raises(ModelError, match=f"is a {name}, .*{why}"):
            open_driven(model=str(tmp_path))
