"""Any diffusers pipeline for text to image as a backbone, driven through its own call, without an adapter.

The pipeline's own code encodes prompts, prepares latents, guides, combines outputs and decodes. What it needs to be
told, and how, is found by watching a call when the pipeline is opened, and refused where it is not understood.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.backbones.clock import ADAPTER, PROBES, Clock, Seen, bind, read_clock, rows_of
from epd_ray.backbones.conversation import LIMIT, NETWORKS, Answer, Moment, Planned, Session, Talk
from epd_ray.backbones.discrete import DiscreteTime, network_input
from epd_ray.backbones.grids import distinct, published_grid, scheduler_grid
from epd_ray.backbones.index import read_index, unsupported
from epd_ray.backbones.loading import PipelineOptions, open_pipeline, speed_up
from epd_ray.backbones.pipeline import count_tokens, quiet
from epd_ray.errors import ModelError, ScheduleError, is_own_bug, shown
from epd_ray.randomness import torch_generator
from epd_ray.solvers.scheduler_config import facts_of
from epd_ray.types import Conditioning, Form, Grid
from epd_ray.weights.devices import pick_dtype

BLANK = "a"  # the prompt of calls that draw noise or decode, whose network is not asked
OURS = frozenset(
    {
        *("prompt", "num_inference_steps", "timesteps", "sigmas", "latents", "generator"),
        *("output_type", "return_dict", "output", "callback_on_step_end", "num_images_per_prompt"),
        *("num_videos_per_prompt", "self", "args", "kwargs", "state"),
    }
)  # arguments of a pipeline's call that the driver gives
TRUE_SCALE = "true_cfg_scale"  # of pipelines whose guidance_scale is an input of the network, where that has one
LATER = (0.9, 0.2, 0.7)  # shares of the timesteps that come later, at the three probes: no line goes through them
ROUNDED = 1.0  # by which a timestep may be off: some schedulers round them down
SHIFT_STEPS = 50  # some pipelines shift by the number of steps: the shift that is told is that of so many


class DrivenBackbone:
    """A pipeline as an epd_ray.types.Backbone, by its own call. K points of a sample are evaluated one after another.

    Args:
        pipeline: the result of `open_pipeline`.
        options: the options that the pipeline was opened with.
        call: further keyword arguments of the pipeline's call, such as negative_prompt, height and width.
        commit: commit of a hub repository; None for a directory.
        fingerprint: fingerprint of a directory; None for a hub repository.

    Raises:
        ModelError: the driver cannot follow the pipeline's loop; the message says which fact is missing.
    """

    published = False

    def __init__(
        self,
        pipeline: Any,
        options: PipelineOptions,
        call: Mapping[str, Any] | None = None,
        commit: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.pipeline, self.options, self._call = pipeline, options, dict(call or {})
        self.model_id, self.family = options.model, type(pipeline).__name__
        self.device = pipeline._execution_device
        self._named = f"model {shown(self.model_id)}, a {self.family}"
        self._parameters = call_parameters(pipeline)
        self._check_call()
        networks = [n for name in NETWORKS if (n := getattr(pipeline, name, None)) is not None]
        share = pipeline.config.get("boundary_ratio")  # of Wan 2.2: the timestep at which its networks change
        if len(networks) != 1 + (share is not None):
            raise ModelError(f"{self._named}: it has {len(networks)} networks, expected one: {ADAPTER}")
        self._guidance = read_guidance(pipeline, self._parameters, networks[0], self._named)
        self.default_guidance = self._guidance.usual
        config = pipeline.scheduler.config
        self._time = None if _flows(pipeline.scheduler) else DiscreteTime(pipeline.scheduler, options.model)
        self.form: Form = "flow" if self._time is None else "ve"
        self.schedule = "shift" if self._time is None else "uniform"
        self._train_timesteps = float(config.num_train_timesteps)
        self._boundary = None if share is None else share * self._train_timesteps
        self._encoded: dict[str, Any] = {}
        self._plans: dict[int, Planned] = {}
        self._clock, passes = self._watch()
        self.classifier_free = passes > 1
        named = None if {"height", "width"} & self._call.keys() else options.resolution
        height, width = (named, named) if named else self._plan(1).size
        self.facts: Mapping[str, JsonValue] = {
            "resolution": height if height == width else None,
            **({} if height == width else {"size": f"{width}x{height}"}),
            "revision": commit or options.revision,
            **({} if fingerprint is None else {"fingerprint": fingerprint}),
            "dtype": str(pick_dtype(options.dtype, self.device)).removeprefix("torch."),
            "scheduler": facts_of(config, self.form) if self._time is None else self._time.facts,
        }
        self._levels_table = None if self._time else self._read_levels()

    # -- calls of the pipeline ----------------------------------------------------------------------------------------

    def _check_call(self) -> None:
        for name in self._call:
            if name in OURS or name not in self._parameters:
                known = ", ".join(sorted(set(self._parameters) - OURS))
                raise ModelError(
                    f"{self._named}: its call takes no argument {name} from outside, expected one of {known}"
                )

    def _session(
        self,
        prompts: Sequence[str],
        guidance_scale: float,
        length: int,
        *,
        answer: Answer | None = None,
        steps: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Session:
        """Begin a call of the pipeline.

        Args:
            prompts: B prompts.
            guidance_scale: the guidance scale.
            length: number of steps that there can be, see `Talk`.
            answer: what the pipeline gets from its network; None for the network's own answer at each row's own time.
            steps: number of steps that the pipeline is asked for; None for the same as `length`.
            seeds: B seeds of the pipeline's noise; None where nobody looks at it.
        """
        batch = len(prompts)
        given: dict[str, Any] = {"num_frames": 1}
        if self.options.resolution is not None:
            given |= {"height": self.options.resolution, "width": self.options.resolution}
        if self.options.max_sequence_length is not None:
            given["max_sequence_length"] = self.options.max_sequence_length
        given |= self._guidance.arguments(guidance_scale, batch) | self._call
        if isinstance(given.get("negative_prompt"), str):
            given["negative_prompt"] = [given["negative_prompt"]] * batch
        given |= {
            "prompt": list(prompts), "num_inference_steps": steps or length, "output_type": "pt", "return_dict": False,
            "output": "images",
            "generator": [torch_generator(seed) for seed in (seeds or [0] * batch)],
        }  # fmt: skip
        changes = self._guidance.changes(guidance_scale)
        if set(prompts) == {BLANK} and hasattr(self.pipeline, "encode_prompt"):
            changes["encode_prompt"] = self._encode_once
        arguments = {name: value for name, value in given.items() if name in self._parameters}
        try:
            with quiet(self.pipeline):
                return Session(self.pipeline, arguments, Talk(length, answer or self._tell, self._scaled), changes)
        except (ValueError, TypeError) as error:
            if is_own_bug(error):
                raise
            raise ModelError(f"{self._named}: it refuses its call ({' '.join(str(error).split())})") from error

    def _tell(self, moment: Moment | None, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the network with each row's own time; before the first point, there is nothing to ask it."""
        bound = bind(network, args, kwargs)
        if moment is None:
            return self._clock.blank(bound.arguments)
        self._clock.tell(bound.arguments, moment.timestep)
        return network(*bound.args, **bound.kwargs)

    def _scaled(self, rows: Tensor, moment: Moment) -> Tensor:
        """The network's input from latents [R, ...], where the pipeline asks its scheduler to scale them."""
        if self._time is None:
            return rows
        return network_input(rows, moment.sigma.repeat(len(rows) // len(moment.sigma)))

    def _encode_once(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's `encode_prompt` for blank prompts, whose answer is kept."""
        key = repr((args, kwargs))
        if key not in self._encoded:
            self._encoded[key] = self.pipeline.encode_prompt(*args, **kwargs)
        return self._encoded[key]

    # -- what is found out when it is opened --------------------------------------------------------------------------

    def _watch(self) -> tuple[Clock, int]:
        """Watch a call of two pictures: how the network is told the time, and how many passes an evaluation takes."""
        steps: list[list[Seen]] = [[]]
        known: list[Clock] = []

        def answer(moment: Moment | None, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = bind(network, args, kwargs)
            seen = Seen(dict(bound.arguments), rows_of(bound.arguments))
            steps[-1].append(seen)
            if not known:  # the network itself is asked once, to see what it returns
                output = network(*args, **kwargs)
                known.append(Clock((), output, seen.rows))
                return output
            return known[0].blank(bound.arguments)

        batch, scale = 2, max(self.default_guidance, 2.0)
        session = self._session([BLANK] * batch, scale, len(PROBES) + 1, answer=answer, seeds=range(batch))
        x = session.first.sample
        timesteps = [share * self._train_timesteps for share in PROBES]
        for t, later in zip(timesteps, LATER, strict=True):
            steps.append([])
            times = torch.full((batch,), t, device=x.device)
            step = session.evaluate(Moment(x, torch.ones_like(times), times, after=later * self._train_timesteps))
            if float(step.timestep) != t or not torch.equal(step.sample, x):
                what = "timesteps" if float(step.timestep) != t else "latents"
                raise ModelError(f"{self._named}: its loop does not step with the scheduler's own {what}: {ADAPTER}")
        session.end()
        clock = read_clock(self._named, batch, steps[1:], timesteps, known[0].output, known[0].rows)
        return clock, sum(seen.rows for seen in steps[1]) // batch

    def _plan(self, num_steps: int) -> Planned:
        """How the pipeline sets its scheduler for a number of steps."""
        if num_steps not in self._plans:
            self._plans[num_steps] = self._session([BLANK], 1.0, 0, steps=num_steps).first
        return self._plans[num_steps]

    def _set(self, num_steps: int, changes: Mapping[str, Any]) -> Any:
        """The pipeline's own scheduler, or one with other values in its configuration, set as by the pipeline."""
        own, changes, given = self.pipeline.scheduler, dict(changes), dict(self._plan(num_steps).arguments)
        if "shift" in changes:
            given.pop("mu", None)
            shift = changes.pop("shift")
            changes |= {"flow_shift" if "flow_shift" in own.config else "shift": shift, "use_dynamic_shifting": False}
        try:
            scheduler = type(own).from_config(own.config, **changes)
            scheduler.set_timesteps(**given)
        except (ValueError, TypeError) as error:
            said = " ".join(str(error).split())
            raise ScheduleError(f"{self._named}: its {type(own).__name__} cannot be set so ({said})") from error
        return scheduler

    def _read_levels(self) -> tuple[Tensor, Tensor] | None:
        """Which timestep the pipeline tells its network at which sigma of a flow.

        Returns:
            None where it is 1000 * sigma; otherwise sigmas and timesteps [T + 1], increasing, float64: some pipelines
            shift the noise levels but not the time.

        Raises:
            ModelError: the timestep is no function of sigma.
        """
        timesteps, sigmas = _levels_of(self._set(4, {}))
        if (timesteps - sigmas * self._train_timesteps).abs().max() <= ROUNDED:
            return None
        t, s = _levels_of(self._set(int(self._train_timesteps), {}))
        table = torch.cat([s.new_zeros(1), s.flip(0)]), torch.cat([t.new_zeros(1), t.flip(0)])
        if not bool((table[0].diff() > 0).all()) or (timesteps - interpolated(sigmas, *table)).abs().max() > ROUNDED:
            raise ModelError(f"{self._named}: its timesteps do not follow from its sigmas: {ADAPTER}")
        return table

    def _timestep(self, sigma: Tensor) -> Tensor:
        """The scheduler's timestep [B] at sigma [B], which carries its gradient."""
        if self._time is not None:
            return self._time.timestep(sigma)
        if sigma.device.type != "mps":  # which has no float64
            sigma = sigma.double()  # so that sigma comes out of sigma * 1000 / 1000 again
        if self._levels_table is None:
            return sigma * self._train_timesteps
        return interpolated(sigma, *(column.to(sigma) for column in self._levels_table))

    # -- the protocols Backbone and Pipelined -------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> "OpenCall":
        return OpenCall(self, tuple(prompts), guidance_scale)

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are too long for every text encoder, without the words that a pipeline adds."""
        limit = self.options.max_sequence_length
        if limit is None and "max_sequence_length" in self._parameters:
            limit = self._parameters["max_sequence_length"].default
        found = [getattr(self.pipeline, name) for name in self.pipeline.components if name.startswith("tokenizer")]
        limits = [(t, min(t.model_max_length, limit or t.model_max_length)) for t in found if callable(t)]
        return sum(bool(limits) and all(count_tokens(t, prompt) > most for t, most in limits) for prompt in prompts)

    def sigmas(self, num_intervals: int, *, final_zero: bool = False) -> Tensor:
        if self._time is not None:
            return self._time.sigmas(num_intervals, final_zero)
        return self._levels(num_intervals, final_zero, {})

    def _levels(self, num_intervals: int, final_zero: bool, changes: Mapping[str, Any]) -> Tensor:
        """The sigmas of a flow's own scheduler; without `final_zero` those of N + 1 steps without their last, 0."""
        sigmas = distinct(self._set(num_intervals + (not final_zero), changes).sigmas.double())[: num_intervals + 1]
        if len(sigmas) != num_intervals + 1 or not bool((sigmas.diff() < 0).all()):
            raise ScheduleError(
                f"{self._named}: its scheduler makes {len(sigmas)} noise levels that do not all decrease, expected "
                f"{num_intervals + 1}: take another number of intervals"
            )
        return sigmas

    @property
    def shift(self) -> float | None:
        """The factor of a flow's shift; some pipelines shift by the number of steps: then that of SHIFT_STEPS."""
        config = self.pipeline.scheduler.config
        if self._time is not None:
            return None
        if not config.get("use_dynamic_shifting"):
            return float(config.get("flow_shift") or config.get("shift") or 1.0)
        mu = float(self._plan(SHIFT_STEPS).arguments["mu"])
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def scheduler_grid(
        self, scheduler: str, num_intervals: int, *, final_zero: bool, changes: Mapping[str, Any]
    ) -> Grid:
        own = self.pipeline.scheduler
        if self._time is None and scheduler == type(own).__name__:
            return Grid(self._levels(num_intervals, final_zero, changes))
        shift = changes.get("shift", self.shift)
        return scheduler_grid(
            own, scheduler, num_intervals, form=self.form, final_zero=final_zero, shift=shift, changes=changes
        )

    def published_grid(self, name: str, num_intervals: int) -> Grid:
        return published_grid(None, num_intervals, self.model_id)

    def noise(self, seed: int) -> Tensor:
        """The pipeline's own noise for a generator of this seed, in the layout and the precision of its latents."""
        session = self._session([BLANK], 1.0, 1, seeds=[seed])
        session.end()
        latents: Tensor = session.first.sample[0].float().cpu()
        return latents

    def initial(self, noise: Tensor) -> Tensor:
        return noise.to(self.device) * (1.0 if self._time is None else self._time.sigma_max)

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if not isinstance(conditioning, OpenCall):
            raise TypeError(f"conditioning is a {type(conditioning).__name__}, expected what encode gave")
        timestep = self._timestep(sigma)
        k = conditioning.copies
        parts = [self._output(conditioning, x[j::k], sigma[j::k], timestep[j::k]) for j in range(k)]
        output = (parts[0] if k == 1 else torch.stack(parts, 1).flatten(0, 1)).float()
        return output if self._time is None else self._time.drift(x, sigma, output)

    def _output(self, conditioning: "OpenCall", x: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """The pipeline's output at x [B, ...]; where rows lie on both sides of a boundary, it is asked on each side."""
        early = None if self._boundary is None else timestep >= self._boundary
        if early is None or len(early.unique()) == 1:
            return conditioning.call(x, sigma, timestep)
        first = conditioning.call(x, sigma, timestep, timestep[early][0].detach())
        second = conditioning.call(x, sigma, timestep, timestep[~early][0].detach())
        return torch.where(early.reshape(-1, *[1] * (x.ndim - 1)), first, second)

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Tensor:
        session = self._session([BLANK] * len(x), 1.0, 1)
        zero = x.new_zeros(len(x))
        drawn = session.finish(Moment(x, zero, zero))
        pictures: Tensor = drawn[0] if isinstance(drawn, tuple) else drawn
        if pictures.ndim == 5:  # a video [B, frames, 3, H, W]
            if pictures.shape[1] != 1:
                raise ModelError(f"{self._named}: it draws {pictures.shape[1]} frames, expected 1: set num_frames to 1")
            pictures = pictures[:, 0]
        return pictures.float()


class OpenCall:
    """A pipeline's call for B prompts that waits for points, as a Conditioning; K copies share one call.

    Args:
        backbone: whose pipeline is called.
        prompts: B prompts.
        guidance_scale: the guidance scale.
        copies: K, how often each row is repeated (row b * K + k).
    """

    def __init__(self, backbone: DrivenBackbone, prompts: tuple[str, ...], guidance_scale: float) -> None:
        self._backbone, self._prompts, self._scale, self.copies = backbone, prompts, guidance_scale, 1
        self._sessions = [self._begin()]  # shared with the repeated ones

    def _begin(self) -> Session:
        return self._backbone._session(self._prompts, self._scale, LIMIT)

    def __len__(self) -> int:
        return len(self._prompts) * self.copies

    def repeat(self, k: int) -> "OpenCall":
        repeated = copy.copy(self)
        repeated.copies = self.copies * k
        return repeated

    def call(self, x: Tensor, sigma: Tensor, timestep: Tensor, now: Tensor | None = None) -> Tensor:
        """The pipeline's combined output at x [B, ...], sigma [B] and timestep [B]; `now` is that of the pipeline."""
        if self._sessions[0].left <= 1:  # the last step would end the call
            self._sessions[0] = self._begin()
        graph = torch.is_grad_enabled() and (x.requires_grad or sigma.requires_grad)
        return self._sessions[0].evaluate(Moment(x, sigma, timestep, graph, now)).output


@dataclass(frozen=True)
class Guidance:
    """How a pipeline's call is told the guidance scale.

    Attributes:
        argument: name of the argument; None where a component of the pipeline, its guider, holds the scale.
        usual: the scale that the pipeline takes if it is told none.
        guider: that component.
    """

    argument: str | None
    usual: float
    guider: Any = None

    def arguments(self, scale: float, batch: int) -> dict[str, Any]:
        """The arguments of a call for B prompts."""
        if self.argument is None:
            return {}
        negative = {"negative_prompt": [" "] * batch} if self.argument == TRUE_SCALE and scale > 1 else {}
        return {self.argument: scale, **negative}

    def changes(self, scale: float) -> dict[str, Any]:
        """The attributes of the pipeline that its call sees otherwise."""
        return {} if self.guider is None else {"guider": self.guider.new(guidance_scale=scale, enabled=scale > 1)}


def read_guidance(pipeline: Any, parameters: Mapping[str, inspect.Parameter], network: Any, named: str) -> Guidance:
    """How a pipeline is told the guidance scale.

    Args:
        pipeline: an open pipeline.
        parameters: those of its call.
        network: its network, whose configuration says whether it takes the scale as an input.
        named: the model, for messages.

    Raises:
        ModelError: its guider's outputs do not depend on the state and the noise level alone.
    """
    embedded = bool(network.config.get("guidance_embeds"))
    order = (*(["distilled_guidance_scale"] if embedded else [TRUE_SCALE]), "guidance_scale")
    argument = next((name for name in order if name in parameters), None)
    guider = None if argument is not None else getattr(pipeline, "guider", None)
    if guider is None:
        return Guidance(argument, float(parameters[argument].default or 1.0) if argument else 1.0)
    if type(guider).__name__ != "ClassifierFreeGuidance":
        raise ModelError(
            f"{named}: its guider, a {type(guider).__name__}, goes by the number of the step, not by the noise level: "
            "save it with a ClassifierFreeGuidance as its guider"
        )
    return Guidance(None, float(guider.guidance_scale), guider)


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call by name; those of a modular pipeline are the inputs of its blocks."""
    blocks = getattr(pipeline, "blocks", None)
    if blocks is None:
        return inspect.signature(type(pipeline).__call__).parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    found = {i.name: inspect.Parameter(i.name, kind, default=i.default) for i in blocks.inputs if i.name}
    return {**found, "output": inspect.Parameter("output", kind, default=None)}


def _levels_of(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The timesteps of a scheduler's steps and their sigmas, float64, on the CPU."""
    timesteps = scheduler.timesteps.double().cpu()
    return timesteps, scheduler.sigmas[: len(timesteps)].double().cpu()


def interpolated(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The values [M] at x [B] between increasing places [M], along straight lines."""
    right = torch.searchsorted(places, x.detach()).clamp(1, len(places) - 1)
    share = (x - places[right - 1]) / (places[right] - places[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def _flows(scheduler: Any) -> bool:
    config = scheduler.config
    return type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def open_driven(call: Mapping[str, Any] | None = None, **options: Any) -> DrivenBackbone:
    """Open a pipeline directory or hub repository to be driven through its own call.

    Args:
        call: further keyword arguments of the pipeline's call, such as negative_prompt, height and width.
        options: the fields of PipelineOptions.

    Raises:
        ModelError: the model is missing or damaged, an option has a value that it cannot have, or the driver cannot
            follow the pipeline's loop.
        ConfigError: the device or dtype is not available.
    """
    opened = PipelineOptions(**options)
    if opened.parts != "all":
        raise ModelError(f"model {shown(opened.model)} is driven by its own call, as a whole: set encoder_actors to 0")
    index = read_index(opened.model, opened.revision)
    _require_drivable(opened.model, index.class_name)
    denoiser = next((name for name in NETWORKS if index.components.get(name)), NETWORKS[0])
    pipeline = open_pipeline(index, opened, denoiser)
    for name in set(NETWORKS) - {denoiser}:
        if getattr(pipeline, name, None) is not None:
            speed_up(getattr(pipeline, name), opened)
    return DrivenBackbone(pipeline, opened, call, index.commit, index.fingerprint)


def _require_drivable(model: str, class_name: str) -> None:
    """Refuse a pipeline class that diffusers does not have, or that needs more than a prompt."""
    import diffusers

    kind = getattr(diffusers, class_name, None)
    if not inspect.isclass(kind) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise unsupported(model, class_name, f"diffusers {diffusers.__version__} does not have")
    asked = inspect.signature(kind.__call__).parameters
    missing = [name for name in ("prompt", "num_inference_steps") if name not in asked]
    more = [name for name in ("strength", "mask_image", "control_image") if name in asked]
    more += [n for n, p in asked.items() if n != "self" and p.kind != p.VAR_KEYWORD and p.default is p.empty]
    if missing or more:
        why = f"takes no {missing[0]}" if missing else f"needs more than a prompt ({more[0]})"
        raise unsupported(model, class_name, why)


_PARAMETERS = list(inspect.signature(PipelineOptions).parameters.values())
open_driven.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # one list of options
    [*_PARAMETERS, inspect.Parameter("call", inspect.Parameter.KEYWORD_ONLY, default=None)]
)
