"""The text encoders in an actor of their own, which leaves the accelerators of the rollout actors to the pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from epd_ray.actors.cluster import Resources, end_if_broken, resources
from epd_ray.actors.reward_pool import insist
from epd_ray.backbones import BACKBONES
from epd_ray.telemetry.memory import Memory, peak_memory

ENCODERS = "the text encoders"


@dataclass(frozen=True)
class EncoderSpec:
    """The actor that holds the text encoders for all rollout actors.

    Attributes:
        num_cpus: that it asks for.
        num_gpus: that it asks for; 0 puts the encoders on the CPU.
        resources: custom ones that it asks for.
    """

    num_cpus: float = 0.25
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundle(self) -> Resources:
        """What the actor asks for."""
        return resources(self.num_cpus, self.num_gpus, self.resources)


class EncoderActor:
    """A pipeline's text encoders in their own process; loaded when first asked for, so that errors travel whole.

    Args:
        family: of the backbone.
        options: its arguments.
        spec: what the actor has.
    """

    def __init__(self, family: str, options: Mapping[str, Any], spec: EncoderSpec) -> None:
        on_cpu = {} if spec.num_gpus else {"device": "cpu", "offload": "none"}
        self._family, self._options = family, {**options, **on_cpu, "parts": "text"}
        self._threads = max(1, int(spec.num_cpus))
        self._encoders: Any = None

    def __repr__(self) -> str:  # what Ray's dashboard and logs call it
        return ENCODERS

    def ready(self) -> None:
        """Load the encoders, once.

        Raises:
            EpdRayError: the model's own error.
        """
        if self._encoders is None:
            if not torch.cuda.is_available():
                torch.set_num_threads(self._threads)
            self._encoders = BACKBONES.build(self._family, self._options)

    def embed(self, prompt: str) -> tuple[Tensor, ...]:
        """One prompt's embedding, on the CPU; the backbone's own for the empty prompt."""
        with end_if_broken():
            self.ready()
            return tuple(tensor.cpu() for tensor in self._encoders.embeddings([prompt])[0])

    def memory(self) -> Memory:
        """Peaks of this actor."""
        return peak_memory()


def start_encoder(name: str, family: str, options: Mapping[str, Any], spec: EncoderSpec) -> "ActorHandle[EncoderActor]":
    """Start the encoder actor under a name that is unique on the cluster."""
    lasting = {"max_restarts": -1, "max_task_retries": 0}  # its users ask again, but not for ever
    asked = {"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus, "resources": dict(spec.resources)}
    return ray.remote(EncoderActor).options(name=name, **lasting, **asked).remote(family, dict(options), spec)


def wait_for_encoder(actor: "ActorHandle[EncoderActor]") -> None:
    """Block until the encoders are loaded.

    Raises:
        EpdRayError: the model's own error, or that its processes died over it.
    """
    insist(actor, ENCODERS, "loading", actor.ready.remote)


def embed_with(name: str) -> Callable[[str], tuple[Tensor, ...]]:
    """What PipelineBackbone.encode_with takes: prompts are embedded by the encoder actor of this name."""
    actor = ray.get_actor(name)

    def embed(prompt: str) -> tuple[Tensor, ...]:
        doing = f"embedding {prompt[:40]!r}"
        tensors: tuple[Tensor, ...] = insist(actor, ENCODERS, doing, lambda: actor.embed.remote(prompt))
        return tensors

    return embed
