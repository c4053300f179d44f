"""Latency mode: a diffusers pipeline evaluates the points of an interval in one batch, or each on its own device."""

import copy
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from epd_ray.backbones.doors import DOORS, Door, door_of
from epd_ray.deploy.guidance import GuidanceHook, guidable_door
from epd_ray.deploy.inputs import SHARED, by_name, each_tensor, with_answer
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import ModelError, shown
from epd_ray.solvers import Solver
from epd_ray.solvers.stepwise import PointInputs

Pipeline = TypeVar("Pipeline")


def parallelize(
    pipe: Pipeline, solver: Solver | str | os.PathLike[str], devices: Sequence[str | torch.device] | None = None
) -> Pipeline:
    """Let a pipeline run a solver with all points of an interval evaluated at once; the pipeline is called as before.

    The pipeline is changed in place: it gets another scheduler, and its network gets hooks that act as long as that
    scheduler is in use. `restore` undoes this. The networks on further devices are copies of the network, which are
    made anew when its weights or adapters have changed.

    Args:
        pipe: a Stable Diffusion (1, 2, XL, 3) or FLUX pipeline for text to image.
        solver: made for the pipeline's model, or what `Solver.from_pretrained` takes: a directory, a preset or a hub
            id. Facts about the network that its meta lacks are taken from the pipeline's scheduler.
        devices: the devices that share the points. The first must be the device of the network; at most as many are
            used as there are points to evaluate. None means the network's device alone.

    Returns:
        The same pipeline.

    Raises:
        ModelError: a pipeline of another kind, a solver that does not fit it, or a device that is not available.
        TableError: too little is known about the network, or it is not the one that the solver was made for.
    """
    whole: Any = pipe
    door = _door(whole)
    solver = _fitting(whole, door, solver)
    if solver.table.guides:
        guidable_door(whole, solver.table)
    restore(pipe)
    network: nn.Module = getattr(whole, door.network)
    used = _devices(devices, network)[: solver.table.points - solver.table.start_point]
    scheduler = EPDScheduler.from_solver(solver, like=whole.scheduler)
    scheduler.set_parallel(True)
    expansion = _Expansion(weakref.ref(whole), scheduler, door, _Replicas(network, used[1:]))
    hooks: list[Any] = [expansion]
    if solver.table.guides:  # around the other: what it leaves of the pipeline's rows is then expanded
        hooks = [GuidanceHook(weakref.ref(whole), scheduler, door), expansion]
    _install(whole, scheduler, network, hooks, expansion)
    return pipe


def guide(pipe: Pipeline, solver: Solver | str | os.PathLike[str]) -> Pipeline:
    """Let a pipeline run a solver that sets the guidance of each interval, with one evaluation a call of its network.

    The pipeline is changed in place, as by `parallelize`: it gets an EPDScheduler, and its network gets hooks that set
    the guidance scale of each evaluation and leave out the pass without the prompt where the solver does. `restore`
    undoes this. `parallelize` does the same where all points of an interval shall be one call.

    Args:
        pipe: a Stable Diffusion (1, 2, XL, 3) or FLUX pipeline for text to image, image to image or inpainting, or a
            Stable Diffusion pipeline with a ControlNet, which is itself still asked without the prompt. Or any pipeline
            with a ClassifierFreeGuidance as its guider, as modular ones have, which is replaced in place of the hooks.
        solver: see `parallelize`.

    Returns:
        The same pipeline.

    Raises:
        ModelError: a pipeline of another kind, or a solver that does not fit it.
        TableError: too little is known about the network, or it is not the one that the solver was made for.
    """
    whole: Any = pipe
    solver = solver if isinstance(solver, Solver) else Solver.from_pretrained(solver)
    if solver.table.guides and getattr(whole, "guider", None) is not None:
        _guide_by_guider(whole, solver)
        return pipe
    door = guidable_door(whole, solver.table)
    solver = _fitting(whole, door, solver)
    restore(pipe)
    scheduler = EPDScheduler.from_solver(solver, like=whole.scheduler)
    hook = GuidanceHook(weakref.ref(whole), scheduler, door)
    _install(whole, scheduler, getattr(whole, door.network), [hook] if solver.table.guides else [], None)
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo `parallelize`: remove the hooks, and put the former scheduler back unless somebody has set another one.

    Args:
        pipe: any pipeline; one that was not parallelized is left as it is.

    Returns:
        The same pipeline.
    """
    whole: Any = pipe
    installed = _installed.pop(whole, None)
    if installed is not None:
        for undo in installed.undo:
            undo()
        if installed.expansion is not None:
            installed.expansion.close()
        if whole.scheduler is installed.scheduler:
            whole.scheduler = installed.former
    return pipe


def _fitting(pipe: Any, door: Door, solver: Solver | str | os.PathLike[str]) -> Solver:
    """The solver, read if need be, for a pipeline of its own form and family."""
    solver = solver if isinstance(solver, Solver) else Solver.from_pretrained(solver)
    if solver.form not in (None, door.form):
        raise ModelError(
            f"the solver is for a model of form {shown(solver.form)}, but {type(pipe).__name__} is "
            f"of form {shown(door.form)}"
        )
    made_for = solver.meta.get("backbone", door.family)
    if made_for != door.family:
        raise ModelError(
            f"the solver is for the backbone family {made_for}, but {type(pipe).__name__} is of the family "
            f"{door.family} (take a solver of the same family)"
        )
    return solver


def _install(
    pipe: Any, scheduler: EPDScheduler, network: nn.Module, hooks: Sequence[Any], expansion: "_Expansion | None"
) -> None:
    """Put a scheduler into a pipeline, and hooks around its network, of which the first is the outermost."""
    # torch.compile leaves the hooks out of its graphs, which would else be made anew for each interval.
    handles = [
        *(network.register_forward_pre_hook(torch.compiler.disable(h.before), with_kwargs=True) for h in hooks),
        *(network.register_forward_hook(torch.compiler.disable(h.after), with_kwargs=True) for h in reversed(hooks)),
    ]
    _installed[pipe] = _Installed(pipe.scheduler, scheduler, expansion, tuple(handle.remove for handle in handles))
    pipe.scheduler = scheduler


def _guide_by_guider(pipe: Any, solver: Solver) -> None:
    """`guide` for a pipeline whose guidance is a component."""
    from epd_ray.deploy.guider import IntervalGuider  # here: diffusers takes long to import its guiders

    if getattr(pipe, "ocr_guider", None) is not None:
        raise ModelError(
            f"{type(pipe).__name__} has a second guider, ocr_guider, in place of the first for some prompts "
            "(set ocr_guider to None)"
        )
    restore(pipe)
    scheduler = EPDScheduler.from_solver(solver, like=pipe.scheduler)
    former, held = pipe.guider, weakref.ref(pipe)
    guider = IntervalGuider(former, held, scheduler)

    def undo() -> None:
        if (whole := held()) is not None and whole.guider is guider:
            whole.guider = former

    _installed[pipe] = _Installed(pipe.scheduler, scheduler, None, (undo,))
    pipe.guider, pipe.scheduler = guider, scheduler


class _Replicas:
    """Copies of a network on further devices, made anew when it has changed, as by an adapter that was loaded later."""

    def __init__(self, network: nn.Module, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._own_hooks = {*network._forward_pre_hooks, *network._forward_hooks}
        self._made: list[nn.Module] = []
        self._state: object = None
        self.of(network)

    def __len__(self) -> int:
        return len(self._devices)

    def of(self, network: nn.Module) -> list[nn.Module]:
        """The copies of the network as it is now."""
        if self._devices and (state := _state(network)) != self._state:
            self._made = []  # frees its memory first
            self._made = [_replica(network, device) for device in self._devices]
            for replica in self._made:
                for hooks in (replica._forward_pre_hooks, replica._forward_hooks):
                    for added in hooks.keys() - self._own_hooks:  # those of `parallelize`
                        del hooks[added]
            self._state = state
        return self._made


class _Expansion:
    """The hooks around the network of a parallelized pipeline.

    `before` makes one row per point, and starts the network's replicas on their shares of the points. `after` joins
    their outputs with that of the network itself. Where the pipeline calls the network again with layers left out, it
    does so for all points of an interval; `after` then puts the answer with all layers in place of those of the points
    outside of the pipeline's window, whose difference to that answer is 0.
    """

    def __init__(self, pipe: "weakref.ref[Any]", scheduler: EPDScheduler, door: Door, replicas: _Replicas) -> None:
        self.scheduler = scheduler
        self._pipe, self._door, self._replicas = pipe, door, replicas
        self._pool = ThreadPoolExecutor(len(replicas), "epd-points") if len(replicas) else None
        self._pending: tuple[int, list[Future[Tensor]]] | None = None
        self._within: list[bool] | None = None  # for each point of this call, whether layers may be left out
        self._whole: Tensor | None = None  # [B * k, ...], the last answer to the prompts with all layers

    def before(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._settle()
        self._within = None
        pipe = self._pipe()
        if pipe is None or pipe.scheduler is not self.scheduler:
            return None
        self._within = self.scheduler.skips_layers()
        given = by_name(self._door, args, kwargs)
        points = self.scheduler.point_inputs(given[self._door.hidden])
        if points is None:
            return None
        shares = torch.arange(len(points.timesteps)).tensor_split(len(self._replicas) + 1)
        own, *others = [self._inputs(given, points, share.tolist()) for share in shares]
        if self._pool is not None:
            mode = _Mode.here(points.hidden.device.type)
            futures = [
                self._pool.submit(_forward, replica, _move(inputs, _device(replica)), mode)
                for replica, inputs in zip(self._replicas.of(network), others, strict=True)
            ]
            self._pending = len(points.hidden), futures
        return (), own

    def after(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        answer: Tensor = output[0]
        if self._pending is not None:
            (rows, futures), self._pending = self._pending, None
            parts = [answer, *(future.result().to(answer.device) for future in futures)]
            # each [R * k, ...] -> [R, k, ...], then [R * K, ...]
            answer = torch.cat([part.unflatten(0, (rows, -1)) for part in parts], 1).flatten(0, 1)
        if self._within is not None:
            if kwargs.get("skip_layers") is None:
                self._whole = answer.chunk(2)[1]
            else:
                answer, self._whole = self._only_within(answer, self._within), None
        if answer is output[0]:
            return None
        return with_answer(output, answer)

    def _only_within(self, answer: Tensor, within: list[bool]) -> Tensor:
        """The answer [B * k, ...] without layers, and that with all layers at the points outside of the window."""
        assert self._whole is not None  # the pipeline asks for it first
        kept = torch.tensor(within, device=answer.device).repeat(len(answer) // len(within))
        return torch.where(kept.view(-1, *[1] * (answer.ndim - 1)), answer, self._whole)

    def close(self) -> None:
        self._settle()
        if self._pool is not None:
            self._pool.shutdown()

    def _settle(self) -> None:
        """Wait for the replicas: a call that failed may have left them at work."""
        if self._pending is not None:
            wait(self._pending[1])
            self._pending = None

    def _inputs(self, given: Mapping[str, Any], points: PointInputs, share: list[int]) -> dict[str, Any]:
        """The network's arguments for some of the points: one row per row of the pipeline and point."""
        hidden = points.hidden[:, share]  # [R, k, ...]
        rows = len(hidden)
        timesteps = points.timesteps[share] * self._door.time_unit  # [k]
        repeated = {
            name: value if name in SHARED else _repeat(value, rows, len(share))
            for name, value in given.items()
            if name not in (self._door.hidden, "timestep")
        }
        return {self._door.hidden: hidden.flatten(0, 1), "timestep": timesteps.repeat(rows), **repeated}


@dataclass(frozen=True)
class _Mode:
    """Settings that torch keeps separately for each thread."""

    grad: bool
    inference: bool
    autocast: torch.dtype | None

    @classmethod
    def here(cls, device_type: str) -> "_Mode":
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


@dataclass(frozen=True)
class _Installed:
    former: Any  # scheduler
    scheduler: EPDScheduler
    expansion: _Expansion | None
    undo: tuple[Callable[[], object], ...]


_installed: "weakref.WeakKeyDictionary[Any, _Installed]" = weakref.WeakKeyDictionary()


def _forward(network: nn.Module, inputs: dict[str, Any], mode: _Mode) -> Tensor:
    device = _device(network)
    with (
        torch.inference_mode(mode.inference),
        torch.set_grad_enabled(mode.grad),
        torch.autocast(device.type, mode.autocast, enabled=mode.autocast is not None),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        output: Tensor = network(**inputs)[0]
    return output


def _repeat(value: Any, rows: int, times: int) -> Any:
    """Repeat each row `times` times in a row, in every tensor that has `rows` rows."""
    return each_tensor(value, lambda t: t.repeat_interleave(times, 0) if t.ndim and len(t) == rows else t)


def _move(value: Any, device: torch.device) -> Any:
    # A non-blocking copy to the CPU could be read before it is complete.
    return each_tensor(value, lambda t: t.to(device, non_blocking=device.type == "cuda"))


def _replica(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the network, made directly on the device: a copy beside the network would need its memory twice."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(device, copy=True), p.requires_grad)
        for p in network.parameters()
        if type(p) is nn.Parameter  # quantised ones know by themselves how to be copied
    }
    memo |= {id(b): b.detach().to(device, copy=True) for b in network.buffers() if type(b) is Tensor}
    return copy.deepcopy(network, memo).to(device)


def _state(network: nn.Module) -> object:
    """What differs when a network was changed: its modules, its tensors, and the settings of peft's adapters."""
    settings = ("scaling", "_active_adapter", "merged_adapters", "_disable_adapters")  # beside a layer's weights
    modules = [
        (name, id(module), repr([vars(module)[key] for key in settings if key in vars(module)]))
        for name, module in network.named_modules()
    ]
    tensors = [*network.parameters(), *network.buffers()]
    return modules, [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _door(pipe: Any) -> Door:
    door = door_of(pipe)
    if door is None:
        raise ModelError(f"{type(pipe).__name__} cannot be parallelized, expected one of {', '.join(DOORS)}")
    return door


def _devices(names: Sequence[str | torch.device] | None, network: nn.Module) -> list[torch.device]:
    """The devices with their indices; the first is the network's own."""
    own = _device(network)
    if names is None:
        return [own]
    if isinstance(names, str) or not names:
        raise ModelError(f"devices is {shown(names)}, expected a list of at least one device")
    found = []
    for name in names:
        try:
            found.append(torch.empty(0, device=name).device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
            raise ModelError(f"device {shown(str(name))} is not available ({str(error).splitlines()[0]})") from error
    if found[0] != own:
        raise ModelError(f"the pipeline's network is on {own}, but devices[0] is {found[0]} (move it: pipe.to(...))")
    return found
