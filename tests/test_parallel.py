"""One forward for all points of an interval, against one call for each and against the solver's own loop."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

from epd_ray.backbones.doors import DOORS
from epd_ray.deploy.parallelize import _move, _replica, parallelize, restore
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import ModelError, TableError
from epd_ray.solvers import Solver
from tests.test_scheduler import (
    CASES,
    FAMILIES,
    PROMPTS,
    VARIANTS,
    by_hand,
    call,
    difference,
    folders,
    load,
    make_solver,
)
from tests.tiny_models import save_ddpm

__all__ = ["folders", "load"]  # fixtures


def network_of(pipe: Any) -> nn.Module:
    return pipe.unet if "unet" in pipe.components else pipe.transformer


def rows_seen(pipe: Any) -> list[int]:
    """Rows of each forward, as the network itself sees them; fills up while the pipeline runs."""
    seen: list[int] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        seen.append(len(hidden))

    network_of(pipe).register_forward_pre_hook(record, with_kwargs=True)
    return seen


def sequential(pipe: Any, name: str, solver: Solver, **options: Any) -> Tensor:
    theirs = pipe.scheduler
    pipe.scheduler = EPDScheduler.from_solver(solver)
    result = call(pipe, FAMILIES[name], **options)
    pipe.scheduler = theirs
    return result


@pytest.mark.parametrize(("name", "variant"), CASES)
@torch.no_grad()
def test_equals_one_call_for_each_point(load: Any, name: str, variant: str) -> None:
    pipe, family = load(name), FAMILIES[name]
    solver = make_solver(family, **VARIANTS[variant])
    one_by_one = sequential(pipe, name, solver)
    expected = by_hand(pipe, family, solver)
    assert parallelize(pipe, solver) is pipe
    seen = rows_seen(pipe)
    result = call(pipe, family)
    assert difference(result, one_by_one) < 1e-5 and difference(result, expected) < 1e-5
    copies = 1 if name == "flux" else 2
    new = [solver.table.points - solver.table.known_points(i, solver.afs) for i in range(3)]
    pattern = [rows for points in new for rows in (2 * copies, 2 * copies * points) if rows]
    assert seen == pattern[solver.afs :] and len(seen) == solver.parallel_nfe
    assert torch.equal(call(pipe, family), result)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"guidance_scale": 1.0}) for name in FAMILIES),
    *((name, {"num_images_per_prompt": 2}) for name in FAMILIES),
    ("sd", {"guidance_rescale": 0.7}),
    ("sdxl", {"guidance_rescale": 0.7, "prompt": PROMPTS[:1]}),
    ("sdxl", {"negative_prompt": PROMPTS[::-1], "negative_original_size": (8, 8), "negative_target_size": (16, 16)}),
    ("sd3", {"negative_prompt": ["a", "b"]}),
    ("flux", {"true_cfg_scale": 2.0, "negative_prompt": PROMPTS[::-1]}),
    ("flux", {"prompt": PROMPTS * 8}),  # as many rows as tokens
]


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
@torch.no_grad()
def test_is_right_under_a_pipelines_options(load: Any, name: str, options: dict[str, Any]) -> None:
    pipe, solver = load(name), make_solver(FAMILIES[name], afs=True, order=2)
    expected = sequential(pipe, name, solver, **options)
    parallelize(pipe, solver)
    assert difference(call(pipe, FAMILIES[name], **options), expected) < 1e-5


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_network_with_embedded_guidance_or_without(load: Any, name: str) -> None:
    pipe, solver = load(name), make_solver(FAMILIES[name])
    if name == "flux":
        pipe.transformer.register_to_config(guidance_embeds=False)
        embed = pipe.transformer.time_text_embed
        pipe.transformer.time_text_embed.forward = lambda t, *rest: type(embed).forward(
            embed, t, rest[0] if len(rest) == 2 else torch.full_like(t, 3500.0), rest[-1]
        )
    else:
        unet = pipe.unet
        torch.manual_seed(0)
        unet.register_to_config(time_cond_proj_dim=8)
        unet.time_embedding.cond_proj = nn.Linear(8, unet.time_embedding.linear_1.in_features, bias=False)
    expected = sequential(pipe, name, solver)
    parallelize(pipe, solver)
    assert difference(call(pipe, FAMILIES[name]), expected) < 1e-5


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(load: Any, name: str, dtype: torch.dtype) -> None:
    solver = make_solver(FAMILIES[name])
    pipe = load(name, dtype)
    result = call(parallelize(pipe, solver), FAMILIES[name], latents=start_of(name, dtype))
    assert result.dtype == dtype
    exact = call(parallelize(load(name), solver), FAMILIES[name], latents=start_of(name, dtype).float())
    assert difference(result.float(), exact) < (0.03 if dtype == torch.bfloat16 else 0.006)


def start_of(name: str, dtype: torch.dtype) -> Tensor:
    shape = (2, 16, 16) if name == "flux" else (2, 4, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# -- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices"),
    [*((name, ["cpu"] * 2) for name in FAMILIES), *(("sd3", ["cpu"] * count) for count in (1, 3, 5))],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
@torch.no_grad()
def test_devices_share_the_points(load: Any, name: str, devices: list[str]) -> None:
    pipe, family = load(name), FAMILIES[name]
    solver = make_solver(family, points=3, afs=True)
    expected = call(parallelize(pipe, solver), family)
    parallelize(pipe, solver, devices)
    seen = rows_seen(pipe)
    assert difference(call(pipe, family), expected) < 1e-5
    copies = 1 if name == "flux" else 2
    own = -(-3 // min(3, len(devices)))  # points on the first device
    assert seen == ([2 * copies, 2 * copies * own] * 3)[1:]


@torch.no_grad()
def test_a_start_point_needs_no_device(load: Any) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    solver = make_solver(family, points=3, start_point=True)
    expected = call(parallelize(pipe, solver), family)
    parallelize(pipe, solver, ["cpu"] * 3)
    seen = rows_seen(pipe)
    assert difference(call(pipe, family), expected) < 1e-5
    assert seen == [4, 4] * 3


class Meeting:
    """Lets a forward of an interval's points go on only when all replicas are in one."""

    def __init__(self, parties: int, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
        self.barrier, self.grad, self.met = threading.Barrier(parties, timeout=20), [], 0
        original = kind.forward

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if len(kwargs["hidden_states"]) == 4 * 2:  # four rows with guidance, two points on each replica
                self.barrier.wait()
                self.grad.append(torch.is_grad_enabled())
                self.met += 1
            return original(module, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("count", [2, 3])
def test_replicas_work_at_the_same_time(load: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    solver = make_solver(family, points=2 * count)
    expected = call(parallelize(pipe, solver), family)
    restore(pipe)
    meeting = Meeting(count, monkeypatch, type(pipe.transformer))
    parallelize(pipe, solver, ["cpu"] * count)
    assert difference(call(pipe, family), expected) < 1e-5
    assert meeting.met == count * 3 and not any(meeting.grad)
    assert not expected.requires_grad


def test_a_replica_that_fails_fails_the_call_and_not_the_next(load: Any) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    solver = make_solver(family)
    parallelize(pipe, solver, ["cpu", "cpu"])
    expected = call(pipe, family)
    main, failing = threading.main_thread(), {"replica"}

    def fail(module: nn.Module, args: Any) -> None:
        here = "own" if threading.current_thread() is main else "replica"
        if here in failing and len(args[0]) > 4 - 1:
            raise RuntimeError(f"{here} is out of memory")

    # The embedding of patches is part of the network: a hook there is in the copies only when it was there before.
    restore(pipe)
    handle = pipe.transformer.pos_embed.register_forward_pre_hook(fail)
    parallelize(pipe, solver, ["cpu", "cpu"])
    with pytest.raises(RuntimeError, match="replica is out of memory"):
        call(pipe, family)
    failing.clear()
    assert torch.equal(call(pipe, family), expected)
    failing.add("own")
    with pytest.raises(RuntimeError, match="own is out of memory"):
        call(pipe, family, seed=1)
    failing.clear()
    assert torch.equal(call(pipe, family), expected)
    handle.remove()


def test_threads_inherit_what_torch_keeps_for_each(load: Any) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    solver = make_solver(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(parallelize(pipe, solver), family)
        shared = call(parallelize(pipe, solver, ["cpu", "cpu"]), family)
    assert torch.equal(shared, expected)
    with torch.inference_mode():
        assert call(pipe, family).is_inference()


# -- installed and removed --------------------------------------------------------------------------------------------


def test_another_scheduler_meets_no_hook(load: Any) -> None:
    pipe, family = load("sd"), FAMILIES["sd"]
    theirs = pipe.scheduler
    euler = EulerDiscreteScheduler.from_config(theirs.config)
    pipe.scheduler = euler
    expected = call(pipe, family)
    parallelize(pipe, make_solver(family))

    def fail(pipe: Any, i: int, t: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        call(pipe, family, callback_on_step_end=fail)  # leaves a loop half done
    learned = pipe.scheduler
    pipe.scheduler = euler
    assert torch.equal(call(pipe, family), expected)
    pipe.scheduler = learned
    assert not torch.equal(call(pipe, family), expected)


def test_restore_leaves_no_trace(load: Any) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    theirs = pipe.scheduler
    expected = call(pipe, family)
    for devices in (None, ["cpu", "cpu"]):
        parallelize(pipe, make_solver(family), devices)
        call(pipe, family)
    assert len(pipe.transformer._forward_pre_hooks) == len(pipe.transformer._forward_hooks) == 1
    assert restore(pipe) is pipe and pipe.scheduler is theirs
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks
    assert torch.equal(call(pipe, family), expected)
    restore(pipe)
    parallelize(pipe, make_solver(family))
    mine = EPDScheduler.from_solver(make_solver(family))
    pipe.scheduler = mine
    assert restore(pipe).scheduler is mine


def test_latents_keep_their_rows_for_callbacks(load: Any) -> None:
    pipe, family = load("sd"), FAMILIES["sd"]
    parallelize(pipe, make_solver(family))
    shapes: list[Any] = []

    def look(pipe: Any, i: int, t: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        shapes.append(tuple(kwargs["latents"].shape))
        return {}

    call(pipe, family, callback_on_step_end=look)
    assert shapes == [(2, 4, 8, 8)] * 6


def test_a_saved_pipeline_runs_one_by_one(load: Any, tmp_path: Any) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    expected = call(parallelize(pipe, make_solver(family)), family)
    pipe.save_pretrained(tmp_path)
    again = family.pipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert again.scheduler.order == 3 and not again.scheduler.parallel
    assert difference(call(again, family), expected) < 1e-5


def test_pipelines_are_not_kept_alive(load: Any) -> None:
    pipe = parallelize(load("sd3"), make_solver(FAMILIES["sd3"]), ["cpu", "cpu"])
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None


def test_subclasses_are_pipelines_of_their_kind(load: Any) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    mine = type("Mine", (family.pipeline,), {})(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    expected = sequential(mine, "sd3", make_solver(family))
    assert difference(call(parallelize(mine, make_solver(family)), family), expected) < 1e-5


def test_refuses_what_it_cannot_do(load: Any, tmp_path: Any) -> None:
    from diffusers import DDPMPipeline

    pipe, solver = load("sd3"), make_solver(FAMILIES["sd3"])
    unconditional = DDPMPipeline.from_pretrained(save_ddpm(tmp_path / "ddpm"), low_cpu_mem_usage=False)
    with pytest.raises(ModelError, match=r"DDPMPipeline.*StableDiffusionPipeline"):
        parallelize(unconditional, solver)
    with pytest.raises(ModelError, match=r"'ve'.*StableDiffusion3Pipeline.*'flow'"):
        parallelize(pipe, make_solver(FAMILIES["sd"]))
    with pytest.raises(TableError, match=r"'v_prediction'.*'epsilon'"):
        parallelize(load("sd"), make_solver(FAMILIES["sd-v"]))
    with pytest.raises(ModelError, match="'cuda:7'"):
        parallelize(pipe, solver, ["cpu", "cuda:7"])
    with pytest.raises(ModelError, match=r"device 'gpu' is not available"):
        parallelize(pipe, solver, ["gpu"])
    with pytest.raises(ModelError, match=r"cpu.*devices\[0\] is meta"):
        parallelize(pipe, solver, ["meta", "cpu"])
    for nothing in ([], "cpu"):
        with pytest.raises(ModelError, match="device"):
            parallelize(pipe, solver, nothing)
    assert not pipe.transformer._forward_pre_hooks and type(pipe.scheduler) is not EPDScheduler


def test_refuses_another_family(load: Any) -> None:
    made = make_solver(FAMILIES["sd3"])
    pipe = load("sd3")
    for family in ("flux", "sd"):
        with pytest.raises(ModelError, match=f"{family}, .*StableDiffusion3Pipeline.*sd3"):
            parallelize(pipe, Solver(made.table, made.sigmas, "flow", meta={**made.meta, "backbone": family}))
    parallelize(pipe, Solver(made.table, made.sigmas, "flow", meta={**made.meta, "backbone": "sd3"}))
    assert {door.family for door in DOORS.values()} == {"sd", "sdxl", "sd3", "flux"}


def test_replicas_are_made_where_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Tensor, memo: Any) -> Tensor:
        raise AssertionError("copied beside the original")

    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    network[1].weight = network[0].weight  # tied
    network[0].bias.requires_grad_(False)
    monkeypatch.setattr(Tensor, "__deepcopy__", fail)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", fail)
    for device in ("meta", "cpu"):
        replica = _replica(network, torch.device(device))
        assert replica[1].weight is replica[0].weight and not replica[0].bias.requires_grad
        for (name, ours), theirs in zip(network.state_dict().items(), replica.state_dict().values(), strict=True):
            assert theirs.device.type == device, name
            assert device == "meta" or (torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()), name


def test_only_copies_to_a_gpu_may_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        Tensor, "to", lambda self, device, non_blocking=False: asked.append((device.type, non_blocking))
    )
    for device in ("cpu", "cuda"):
        _move({"x": torch.zeros(1)}, torch.device(device))
    assert asked == [("cpu", False), ("cuda", True)]


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(None, marks=pytest.mark.nightly, id="one"),
        pytest.param(["cpu", "cpu"], marks=pytest.mark.slow, id="two"),
    ],
)
def test_a_compiled_network(load: Any, devices: list[str] | None) -> None:
    pipe, family = load("sd"), FAMILIES["sd"]
    solver = make_solver(family)
    expected = sequential(pipe, "sd", solver)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert difference(call(parallelize(pipe, solver, devices), family), expected) < 1e-5


def test_facts_that_the_solver_lacks_come_from_the_pipeline(load: Any) -> None:
    family = FAMILIES["sd-v"]
    pipe, full = load("sd-v"), make_solver(family)
    expected = call(parallelize(pipe, full), family)
    restore(pipe)
    parallelize(pipe, Solver(full.table, full.sigmas, "ve"))
    assert torch.equal(call(pipe, family), expected)


def test_takes_a_name_as_from_pretrained_does(load: Any, tmp_path: Any) -> None:
    family = FAMILIES["sd3"]
    make_solver(family).save_pretrained(tmp_path)
    expected = call(parallelize(load("sd3"), make_solver(family)), family)
    assert torch.equal(call(parallelize(load("sd3"), tmp_path), family), expected)
    assert parallelize(load("flux"), "flux-rl").scheduler.config.backbone == "flux"
    with pytest.raises(TableError, match="preset"):
        parallelize(load("flux"), "flux-lr")


def with_left_out_layers(pipe: Any, solver: Solver, start: float, stop: float) -> Tensor:
    """Solver.solve on SD3's network, guided by a left-out layer between two shares of the calls, one for each point."""
    embeds, negative, pooled, no_pooled = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=16)
    calls, made = 3 * (1 + solver.table.points - solver.table.start_point), 0

    def network(x: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor, **options: Any) -> Tensor:
        times = len(x) // 2
        return pipe.transformer(
            x, embeds.repeat_interleave(times, 0), pooled.repeat_interleave(times, 0), 1000 * sigma, **options
        ).sample  # fmt: skip

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal made
        points = len(x) // 2
        within = torch.tensor([start < (made + j) / calls < stop for j in range(points)]).repeat(2)
        made += points
        text, empty = network(x, sigma, embeds, pooled), network(x, sigma, negative, no_pooled)
        away = text - network(x, sigma, embeds, pooled, skip_layers=[1])
        return empty + 4.5 * (text - empty) + 2.8 * within[:, None, None, None] * away

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    result = solver.solve(drift, noise)
    assert made == calls
    return result


# Calls 0, 3 and 6 of nine are the intervals' starts. The first window has one point of two, the second four calls.
WINDOWS = [(0.01, 0.2), (0.01, 0.5), (0.0, 1.0)]


@pytest.mark.parametrize(("start", "stop"), WINDOWS)
@torch.no_grad()
def test_left_out_layers_act_on_the_same_share_of_the_loop(load: Any, start: float, stop: float) -> None:
    pipe, solver = load("sd3"), make_solver(FAMILIES["sd3"])
    window = {"skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop}
    asked = {"skip_guidance_layers": [1], "num_inference_steps": 9, **window}
    expected = with_left_out_layers(pipe, solver, start, stop)
    plain, single = sequential(pipe, "sd3", solver), sequential(pipe, "sd3", solver, **asked)
    assert difference(single, expected) < 1e-5 < 1e-3 < difference(single, plain)
    assert difference(call(parallelize(pipe, solver, ["cpu", "cpu"]), FAMILIES["sd3"], **asked), expected) < 1e-5
    assert difference(call(pipe, FAMILIES["sd3"]), plain) < 1e-5


@torch.no_grad()
def test_left_out_layers_after_a_start_point(load: Any) -> None:
    pipe, solver = load("sd3"), make_solver(FAMILIES["sd3"], points=3, order=2, start_point=True)
    asked = {"skip_guidance_layers": [1], "num_inference_steps": 9}
    expected = with_left_out_layers(pipe, solver, 0.01, 0.2)
    assert difference(sequential(pipe, "sd3", solver, **asked), expected) < 1e-5
    assert difference(call(parallelize(pipe, solver), FAMILIES["sd3"], **asked), expected) < 1e-5


def test_other_windows_of_left_out_layers_are_refused(load: Any) -> None:
    pipe, family, solver = load("sd3"), FAMILIES["sd3"], make_solver(FAMILIES["sd3"])
    asked: dict[str, Any] = {"skip_guidance_layers": [1], "num_inference_steps": 28}
    with pytest.raises(TableError, match=r"num_inference_steps=28 .* makes 9 \(pass num_inference_steps=9\)"):
        sequential(pipe, "sd3", solver, **asked)
    theirs = pipe.scheduler
    pipe.scheduler = EPDScheduler.from_solver(solver)
    asked["guidance_scale"] = 1.0  # the pipeline then leaves out no layers at all
    assert torch.equal(call(pipe, family, **asked), call(pipe, family, guidance_scale=1.0))
    pipe.scheduler = theirs
    parallelize(pipe, solver)
    late = {
        "skip_guidance_layers": [1],
        "num_inference_steps": 9,
        "skip_layer_guidance_start": 0.3,
        "skip_layer_guidance_stop": 1.0,
    }
    with pytest.raises(TableError, match=r"start is 0.3: the network's call 3 evaluates .* begin earlier"):
        call(pipe, family, **late)
    assert difference(call(pipe, family), by_hand(pipe, family, solver)) < 1e-5


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, whose strength is a setting as in peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scaling = base, {"default": 1.0}
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling["default"] * self.up(self.down(x))


@torch.no_grad()
def test_replicas_follow_the_network(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, family = load("sd3"), FAMILIES["sd3"]
    solver = make_solver(family)
    parallelize(pipe, solver, ["cpu", "cpu"])
    learned, before = pipe.scheduler, call(pipe, family)
    attention = pipe.transformer.transformer_blocks[0].attn
    original = attention.to_q
    torch.manual_seed(0)
    adapted = Adapted(original)

    def strengthen() -> None:
        adapted.scaling["default"] = 3.0

    for change in (
        lambda: setattr(attention, "to_q", adapted), strengthen, lambda: adapted.up.weight.mul_(2.0),
        lambda: setattr(attention, "to_q", original),
    ):  # fmt: skip
        change()
        pipe.scheduler = learned
        shared = call(pipe, family)
        alone = sequential(pipe, "sd3", solver)
        assert difference(shared, alone) < 1e-5
        if attention.to_q is adapted:
            assert difference(shared, before) > 1e-4
    monkeypatch.setattr("epd_ray.deploy.parallelize._replica", lambda *_: pytest.fail("copied without a change"))
    pipe.scheduler = learned
    assert torch.equal(call(pipe, family), before)


def test_replicas_follow_a_lora_adapter(load: Any) -> None:
    peft = pytest.importorskip("peft", reason="adapters need the peft package, which this project does not")
    pipe, family = load("sd"), FAMILIES["sd"]
    solver = make_solver(family)
    parallelize(pipe, solver, ["cpu", "cpu"])
    learned, before = pipe.scheduler, call(pipe, family)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]))
    for name, weight in pipe.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.5)
    for change in (lambda: None, pipe.unet.disable_adapters, pipe.unet.enable_adapters, pipe.unet.fuse_lora):
        change()
        pipe.scheduler = learned
        shared = call(pipe, family)
        assert difference(shared, sequential(pipe, "sd", solver)) < 1e-5
    assert difference(shared, before) > 1e-3


def test_a_compiled_network_is_compiled_once_for_each_batch_size(load: Any) -> None:
    pipe, family = load("sd"), FAMILIES["sd"]
    solver = make_solver(family)
    expected = sequential(pipe, "sd", solver)
    sizes: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph

    parallelize(pipe, solver)
    pipe.unet.compile(backend=backend)
    assert difference(call(pipe, family), expected) < 1e-5
    assert 1 <= len(sizes) <= 3 and min(sizes) > 100  # the network for one and for two points a row, and no hook
