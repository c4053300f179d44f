"""What rollout actors are asked to do, and the plain worker that does it; RLlib is not imported here."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import ray
from torch import Tensor

from epd_ray.actors.cluster import end_if_broken, keep
from epd_ray.actors.encoder import embed_with
from epd_ray.backbones import BACKBONES
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.policy.dirichlet import TableSpace
from epd_ray.telemetry.memory import Memory, peak_memory
from epd_ray.types import Backbone, RolloutJob
from epd_ray.weights.devices import one_thread

Method = Literal["describe", "truncated", "generate", "sample", "distill", "distill_loss"]


@dataclass(frozen=True)
class BackboneSpec:
    """Which model the rollout actors load.

    Attributes:
        family: a name in the registry, or "module:Class".
        options: the backbone's keyword arguments.
        guidance_scale: for every picture; None: the usual one of its family.
        encoder: name of the actor that embeds the prompts (family "auto"); None: each rollout actor does.
    """

    family: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float | None = None
    encoder: str | None = None

    def open(self) -> Backbone:
        """Load the model, without its text encoders where an actor has them."""
        if self.encoder is None:
            return BACKBONES.build(self.family, self.options)
        backbone = BACKBONES.build(self.family, {**self.options, "parts": "image"})
        cast(_Textless, backbone).encode_with(embed_with(self.encoder))
        return backbone


class _Textless(Protocol):
    def encode_with(self, embed: Callable[[str], tuple[Tensor, ...]]) -> None: ...


@dataclass(frozen=True)
class WorkerSpec:
    """What a rollout actor builds, once, when its first task comes."""

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
    """A call to RolloutWorker. `score` sends the images on to the reward actors.

    Attributes:
        task_id: unique among pending tasks.
        method: of RolloutWorker.
        arguments: its positional arguments.
        prompts: of the images, in order, for the heads.
        rollout_ids: of the images.
        score: whether the answer has images to score.
        keep_images: whether the images come back to the driver as well.
    """

    task_id: str
    method: Method
    arguments: tuple[Any, ...]
    prompts: tuple[str, ...] = ()
    rollout_ids: tuple[str, ...] = ()
    score: bool = False
    keep_images: bool = False


def task_id(job: RolloutJob) -> str:
    """What a rollout job is called while it is pending."""
    return f"rollout-{job.job_id[0]}-{job.job_id[1]}"


def rollout_task(job: RolloutJob, keep_images: bool = False) -> Task:
    """The task that makes a job's pictures and has them scored."""
    prompts, ids = tuple(r.prompt for r in job.requests), tuple(r.rollout_id for r in job.requests)
    return Task(task_id(job), "generate", (job,), prompts, ids, score=True, keep_images=keep_images)


@dataclass(frozen=True)
class Answer:
    """What came of a task: its value, the images in the object store, or the error; and the actor's peak memory."""

    task_id: str
    value: Any = None
    images: "ray.ObjectRef[Any] | None" = None
    seconds: float = 0.0
    memory: Memory | None = None
    error: BaseException | None = None


class TaskRunner:
    """Does tasks with one backbone, which it loads when the first of them comes.

    Args:
        spec: of the backbone and what is drawn with it.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._worker: RolloutWorker | None = None

    def ready(self) -> None:
        """Load the model, once.

        Raises:
            EpdRayError: what keeps it from being loaded.
        """
        self._built()

    def run(self, task: Task) -> Answer:
        """Do a task; whatever goes wrong travels back as a value, whole."""
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
            one_thread()  # it is the fastest for an actor, too
            self._worker = self._spec.build()
        return self._worker

    def _call(self, task: Task) -> tuple[Any, Any]:
        result = getattr(self._built(), task.method)(*task.arguments)
        if task.method == "generate":
            return result.rollouts, result.images
        return (None, result) if task.method == "sample" else (result, None)
