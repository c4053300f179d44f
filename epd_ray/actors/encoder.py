"""An actor for the text encoders, so that rollout actors need no GPU memory for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from epd_ray.actors.cluster import Resources, end_if_broken, resources
from epd_ray.actors.reward_pool import ATTEMPTS, insist
from epd_ray.actors.waiting import FIRST
from epd_ray.backbones import BACKBONES
from epd_ray.backbones.cache import Prompt
from epd_ray.telemetry.memory import Memory, peak_memory

ENCODERS = "the text encoders"


@dataclass(frozen=True)
class EncoderSpec:
    """The actor that holds the text encoders for all rollout actors.

    Attributes:
        num_cpus: the CPUs that it asks for.
        num_gpus: the GPUs that it asks for, also a share of one; 0 runs the encoders on the CPU.
        resources: the custom resources that it asks for.
    """

    num_cpus: float = 0.25
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundle(self) -> Resources:
        """The resources that the actor asks for."""
        return resources(self.num_cpus, self.num_gpus, self.resources)


class EncoderActor:
    """The text encoders of a pipeline.

    It loads them at the first call and not in its constructor, whose errors Ray would wrap.

    Args:
        family: the name of the backbone in the registry, or "module:Class".
        options: the keyword arguments of the backbone.
        spec: the resources of the actor.
    """

    def __init__(self, family: str, options: Mapping[str, Any], spec: EncoderSpec) -> None:
        on_cpu = {} if spec.num_gpus else {"device": "cpu", "offload": "none"}
        self._family, self._options = family, {**options, **on_cpu, "parts": "text"}
        self._threads = max(1, int(spec.num_cpus))
        self._encoders: Any = None

    def __repr__(self) -> str:  # Ray's dashboard and logs show this
        return ENCODERS

    def ready(self) -> None:
        """Load the encoders, if they are not loaded yet.

        Raises:
            EpdRayError: the model cannot be loaded.
        """
        if self._encoders is None:
            if not torch.cuda.is_available():
                torch.set_num_threads(self._threads)
            self._encoders = BACKBONES.build(self._family, self._options)

    def embed(self, prompt: Prompt) -> tuple[Tensor, ...]:
        """The embedding of a prompt, as tensors on the CPU; the backbone decides how no prompt is embedded."""
        with end_if_broken():
            self.ready()
            return tuple(tensor.cpu() for tensor in self._encoders.embeddings([prompt])[0])

    def memory(self) -> Memory:
        """The peak memory of this actor so far."""
        return peak_memory()


def start_encoder(name: str, family: str, options: Mapping[str, Any], spec: EncoderSpec) -> "ActorHandle[EncoderActor]":
    """Start the encoder actor.

    Args:
        name: a name that is unique on the cluster.
        family: see EncoderActor.
        options: see EncoderActor.
        spec: the resources of the actor.
    """
    lasting = {"max_restarts": -1, "max_task_retries": 0}  # rollout actors repeat a lost call themselves, a few times
    asked = {"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus, "resources": dict(spec.resources)}
    return ray.remote(EncoderActor).options(name=name, **lasting, **asked).remote(family, dict(options), spec)


def wait_for_encoder(actor: "ActorHandle[EncoderActor]", timeout_s: float | None) -> None:
    """Block until the encoders are loaded.

    Args:
        actor: the encoder actor.
        timeout_s: `cluster.task_timeout_s`; loading may take FIRST times as long.

    Raises:
        EpdRayError: the model cannot be loaded, or the processes of the actor died or gave no answer while loading it.
    """
    insist(actor, ENCODERS, "loading", actor.ready.remote, None if timeout_s is None else FIRST * timeout_s)


def embed_with(name: str, timeout_s: float | None = None) -> Callable[[Prompt], tuple[Tensor, ...]]:
    """A function that lets an encoder actor embed a prompt, for PipelineBackbone.encode_with.

    Args:
        name: the name of the actor.
        timeout_s: `cluster.task_timeout_s`. Each process of the encoder has a quarter of it for a prompt, so that
            encoders that hang are named before the rollout actor that waits for them counts as lost itself.
    """
    actor, limit = ray.get_actor(name), None if timeout_s is None else timeout_s / (ATTEMPTS + 1)

    def embed(prompt: Prompt) -> tuple[Tensor, ...]:
        doing = f"embedding {(prompt or '')[:40]!r}"
        tensors: tuple[Tensor, ...] = insist(actor, ENCODERS, doing, lambda: actor.embed.remote(prompt), limit)
        return tensors

    return embed
