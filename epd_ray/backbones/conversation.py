"""A call of a diffusers pipeline that stops at each of its steps and goes on from a point that somebody else names.

A solver is written against `drift(x, sigma)`, a pipeline's loop against `scheduler.step`. So the pipeline's own call
runs in a thread of its own, with a scheduler that hands every output over and waits for the next point. At any time
only one of the two threads works. A call changes its pipeline object, so each one has a shallow copy; the networks are
shared.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

NETWORKS = ("transformer", "transformer_2", "unet")  # components that pipelines of diffusers ask in their loop
LIMIT = 1000  # evaluations in one call of a pipeline; then another call begins

Answer = Callable[["Moment", Any, tuple[Any, ...], dict[str, Any]], Any]
"""answer(moment, network, args, kwargs) is what the pipeline gets when it calls its network."""


@dataclass(frozen=True)
class Moment:
    """Where a pipeline is asked to evaluate.

    Attributes:
        x: [B, ...], the state.
        sigma: [B], the noise levels.
        timestep: [B], the same in the scheduler's time.
        gradient: whether a graph is kept.
        now: the timestep that the pipeline itself reads; None for that of the first row.
        after: the timesteps that the pipeline reads for the steps to come; None for the same as now.
    """

    x: Tensor
    sigma: Tensor
    timestep: Tensor
    gradient: bool = False
    now: Tensor | None = None
    after: float | None = None


@dataclass(frozen=True)
class Step:
    """What a pipeline handed its scheduler: the combined output, the timestep, and the latents, both [B, ...]."""

    output: Tensor
    timestep: Any
    sample: Tensor


@dataclass(frozen=True)
class Planned:
    """How a pipeline set its scheduler: the arguments of `set_timesteps`, and the picture's size in pixels."""

    arguments: dict[str, Any]
    size: tuple[int | None, int | None]


class _Ended(BaseException):
    """Unwinds a call that nobody asks any more; no pipeline catches it."""


class Talk:
    """The state that both threads see.

    Args:
        length: number of steps that the pipeline is told; 0 ends the call where the scheduler is set.
        answer: see `Answer`.
        scaled: scaled(rows, moment) is the network's input in the scale that the model was trained with.
    """

    def __init__(self, length: int, answer: Answer, scaled: Callable[[Tensor, Moment], Tensor]) -> None:
        self.length, self.answer, self.scaled = length, answer, scaled
        self.requests: SimpleQueue[Moment | None] = SimpleQueue()
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self.moment: Moment | None = None

    def ask(self, said: Step) -> Moment:
        """Hand a step over and wait for the next point."""
        self.answers.put(said)
        del said
        self.moment = self.requests.get()
        if self.moment is None:
            raise _Ended
        torch.set_grad_enabled(self.moment.gradient)
        return self.moment


class AskingScheduler:
    """The scheduler that a pipeline's call finds: it asks for the point of each step.

    Args:
        own: the pipeline's scheduler, for its configuration and everything else that is not a step.
        talk: whom to ask.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, own: Any, talk: Talk) -> None:
        self._own, self._talk, self._made = own, talk, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Note what the pipeline asks for. The steps are as many as the talk says, and filled in as they come."""
        length = self._talk.length
        if not length:
            given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "mu": mu, "timesteps": timesteps}
            self._talk.answers.put(Planned({k: v for k, v in given.items() if v is not None}, _size()))
            raise _Ended
        self.num_inference_steps = length
        self.timesteps = torch.full((length,), float(self._own.config.num_train_timesteps), device=device)
        self.sigmas = torch.ones(length + 1)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Every call begins at its first step."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input from the latents [R, ...]."""
        return sample if self._talk.moment is None else self._talk.scaled(sample, self._talk.moment)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, return_dict: bool = True, **__: Any
    ) -> Any:
        """Hand the output over; the latents that come back are the next point."""
        moment = self._talk.ask(Step(model_output, timestep, sample))
        del model_output
        self._made += 1
        with torch.no_grad():  # pipelines read their steps one by one from these tensors
            now = moment.timestep[0] if moment.now is None else moment.now
            self.timesteps[self._made :] = now if moment.after is None else moment.after
            self.timesteps[self._made : self._made + 1] = now
            self.sigmas[self._made :] = moment.sigma[0]
        x = moment.x.to(sample.dtype)
        if not return_dict:
            return x, x
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=x)


def _size() -> tuple[int | None, int | None]:
    """Height and width in pixels, from the call of the pipeline that sets its scheduler; diffusers tells nobody."""
    import inspect

    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("height"), frame.f_locals.get("width")
        if found != (None, None):
            return found
        frame = frame.f_back
    return None, None


class _Asked:
    """A network as a pipeline's copy sees it: calls go to the talk, all else to the network itself."""

    def __init__(self, network: Any, talk: Talk) -> None:
        self._network, self._talk = network, talk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._talk.answer(self._talk.moment, self._network, args, kwargs)  # type: ignore[arg-type]


class Session:
    """One call of a pipeline, from its start to its end; it waits in its first step when this is made.

    Args:
        pipeline: an open pipeline; it is not changed.
        arguments: the keyword arguments of its call.
        talk: made for this call alone.
        changes: attributes of the pipeline that this call sees otherwise.

    Raises:
        Exception: whatever the pipeline raises before its first step.
    """

    def __init__(
        self, pipeline: Any, arguments: Mapping[str, Any], talk: Talk, changes: Mapping[str, Any] | None = None
    ) -> None:
        own = copy.copy(pipeline)
        for name in NETWORKS:
            if getattr(own, name, None) is not None:
                setattr(own, name, _Asked(getattr(pipeline, name), talk))
        own.scheduler = AskingScheduler(pipeline.scheduler, talk)
        if hasattr(pipeline, "maybe_free_model_hooks"):  # which looks for the networks themselves
            own.maybe_free_model_hooks = pipeline.maybe_free_model_hooks
        for name, value in (changes or {}).items():
            setattr(own, name, value)
        self._talk, self.left = talk, talk.length
        threading.Thread(target=_run, args=(own, dict(arguments), talk), daemon=True, name="pipeline call").start()
        self._end = weakref.finalize(self, talk.requests.put, None)
        self.first: Any = self._next()

    def evaluate(self, moment: Moment) -> Step:
        """The pipeline's output at a point; `left` says how many more there can be."""
        self._talk.requests.put(moment)
        self.left -= 1
        step: Step = self._next()
        return step

    def finish(self, moment: Moment) -> Any:
        """Take the last step to a point; returns what the pipeline's call returns. The talk has a length of 1."""
        self._talk.requests.put(moment)
        return self._next()

    def end(self) -> None:
        """End the call where it is."""
        self._end()

    def _next(self) -> Any:
        found = self._talk.answers.get()
        if isinstance(found, BaseException):
            raise found
        return found


def _run(pipeline: Any, arguments: dict[str, Any], talk: Talk) -> None:
    try:
        talk.answers.put(pipeline(**arguments))
    except _Ended:
        pass
    except BaseException as error:  # the other thread waits, and raises it
        talk.answers.put(error)
