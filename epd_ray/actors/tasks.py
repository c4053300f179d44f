"""The tasks of rollout actors, and the class that does them; it does not import RLlib."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import ray
from torch import Tensor

from epd_ray.actors.cluster import end_if_broken, keep
from epd_ray.actors.encoder import embed_with
from epd_ray.backbones import BACKBONES
from epd_ray.backbones.cache import Prompt
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.policy.dirichlet import TableSpace
from epd_ray.stage_one.fit import StageOneMethod
from epd_ray.telemetry.memory import Memory, peak_memory
from epd_ray.types import Backbone, RolloutJob
from epd_ray.weights.devices import one_thread

Method = Literal["describe", "steps", "truncated", "generate", "sample", StageOneMethod]


@dataclass(frozen=True)
class BackboneSpec:
    """The model that the rollout actors load.

    Attributes:
        family: a name in the registry, or "module:Class".
        options: the keyword arguments of the backbone.
        guidance_scale: the guidance scale of every picture; None for the default of the model's family.
        encoder: the name of the actor that embeds the prompts, for family "auto" only; None where each rollout actor
            embeds them itself.
        encoder_timeout_s: see embed_with.
    """

    family: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float | None = None
    encoder: str | None = None
    encoder_timeout_s: float | None = None

    def open(self) -> Backbone:
        """Load the model, without its text encoders where an encoder actor has them."""
        if self.encoder is None:
            return BACKBONES.build(self.family, self.options)
        backbone = BACKBONES.build(self.family, {**self.options, "parts": "image"})
        cast(_Textless, backbone).encode_with(embed_with(self.encoder, self.encoder_timeout_s))
        return backbone


class _Textless(Protocol):
    def encode_with(self, embed: Callable[[Prompt], tuple[Tensor, ...]]) -> None: ...


@dataclass(frozen=True)
class WorkerSpec:
    """The backbone and the sampler that a rollout actor builds when its first task comes."""

    backbone: BackboneSpec
    space: TableSpace
    sampler: Sampler

    def build(self) -> RolloutWorker:
        """Load the model."""
        backbone = self.backbone.open()
        guidance_scale = self.backbone.guidance_scale
        if guidance_scale is None:
            guidance_scale = backbone.default_guidance
        return RolloutWorker(backbone, guidance_scale, self.space, self.sampler)


@dataclass(frozen=True)
class Task:
    """A call of a method of RolloutWorker.

    Attributes:
        task_id: a name that is unique among pending tasks.
        method: the name of the method.
        arguments: the positional arguments of the method.
        prompts: the prompt of each image, in order, for the reward heads.
        rollout_ids: the rollout id of each image, in the same order.
        score: whether the reward actors score the images.
        keep_images: whether the images also come to the driver.
    """

    task_id: str
    method: Method
    arguments: tuple[Any, ...]
    prompts: tuple[str, ...] = ()
    rollout_ids: tuple[str, ...] = ()
    score: bool = False
    keep_images: bool = False


def task_id(job: RolloutJob) -> str:
    """The id of the task of a rollout job."""
    return f"rollout-{job.job_id[0]}-{job.job_id[1]}"


def rollout_task(job: RolloutJob, keep_images: bool = False) -> Task:
    """The task that draws the pictures of a job and lets the reward actors score them."""
    prompts, ids = tuple(r.prompt for r in job.requests), tuple(r.rollout_id for r in job.requests)
    return Task(task_id(job), "generate", (job,), prompts, ids, score=True, keep_images=keep_images)


@dataclass(frozen=True)
class Answer:
    """The answer of a rollout actor to a task.

    Attributes:
        task_id: the id of the task.
        value: what the method returned beside images.
        images: the images, [B, 3, H, W] uint8, in the object store; None where there are none.
        seconds: how long the task took in the actor.
        memory: the peak memory of the actor so far.
        error: the error of the task; None where it succeeded.
    """

    task_id: str
    value: Any = None
    images: "ray.ObjectRef[Any] | None" = None
    seconds: float = 0.0
    memory: Memory | None = None
    error: BaseException | None = None


class TaskRunner:
    """Does tasks with one backbone, which it loads when the first task comes.

    Args:
        spec: the backbone and the sampler.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: RolloutWorker | None = None

    def ready(self) -> None:
        """Load the model, if it is not loaded yet.

        Raises:
            EpdRayError: the model cannot be loaded.
        """
        self._built()

    def run(self, task: Task) -> Answer:
        """Do a task. Errors are returned in the answer, because Ray would wrap an exception."""
        start = time.perf_counter()
        try:
            with end_if_broken():
                value, images = self._call(task)
                reference = None if images is None else keep(images)
        except Exception as error:
            return Answer(task.task_id, error=error)
        return Answer(task.task_id, value, reference, time.perf_counter() - start, peak_memory())

    def _built(self) -> RolloutWorker:
        if self._worker is None:
            one_thread()  # an actor is fastest with one thread, too
            self._worker = self._spec.build()
        return self._worker

    def _call(self, task: Task) -> tuple[Any, Any]:
        result = getattr(self._built(), task.method)(*task.arguments)
        if task.method == "generate":
            return result.rollouts, result.images
        return (None, result) if task.method == "sample" else (result, None)
