"""The records that travel between stages. All frozen; rows are joined by id, never by position."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue
from torch import Tensor

Drift = Callable[[Tensor, Tensor], Tensor]
"""dx/dsigma at x [B, ...] and sigma [B]; same shape and dtype as x."""

Form = Literal["ve", "flow"]
"""How noise enters x: "ve", clean + sigma * noise; "flow", (1 - sigma) * clean + sigma * noise."""

FloatArray = npt.NDArray[np.float32]
ImageArray = npt.NDArray[np.uint8]

OnImages = Callable[[int, ImageArray], None]
"""on_images(first, images): a batch of pictures [b, 3, H, W], those of the prompts from number `first` on.

It is called once for each batch, as the batches come, in any order.
"""


@dataclass(frozen=True)
class RolloutRequest:
    """Everything that decides one image, apart from its job's policy parameters.

    Attributes:
        rollout_id: hash of (run seed, iteration, index), unique in a run.
        group_id: rollouts whose rewards are compared with each other.
        prompt: what to draw.
        noise_seed: seed of the initial latent.
        action_seed: seed of the table's draw.
    """

    rollout_id: str
    group_id: str
    prompt: str
    noise_seed: int
    action_seed: int


@dataclass(frozen=True)
class RolloutJob:
    """A batch of requests: the unit of work and of retry. Its composition never depends on the number of actors.

    Attributes:
        job_id: (iteration, shard).
        policy_version: number of learner updates behind `parameters`.
        parameters: [N, W] float32, the policy's output (see rdpo.policy for the order). This is the weight sync.
        requests: in a fixed order.
    """

    job_id: tuple[int, int]
    policy_version: int
    parameters: FloatArray
    requests: tuple[RolloutRequest, ...]


@dataclass(frozen=True)
class Rollout:
    """What a rollout actor made of one request.

    Attributes:
        rollout_id: the request's.
        action: [N, A] float32: segments (K+1), weights (K), then the trained scales (K each).
        log_prob: of the action under the job's parameters, summed over intervals.
        positions: [N, K] float32 of the table that the picture was made with, in [0, 1].
        weights: [N, K] float32, each row adds up to 1.
        scale_dir: [N, K] float32, where direction scales are trained.
        scale_time: [N, K] float32, where time scales are trained.
    """

    rollout_id: str
    action: FloatArray
    log_prob: float
    positions: FloatArray
    weights: FloatArray
    scale_dir: FloatArray | None
    scale_time: FloatArray | None


@dataclass(frozen=True)
class Sampled:
    """What came of pictures that were drawn for evaluation.

    Attributes:
        scores: head -> raw values, one per prompt, in order.
        reward: the mix of them.
        seconds: that the rollout actors worked, summed.
    """

    scores: dict[str, FloatArray]
    reward: FloatArray
    seconds: float


class Conditioning(Protocol):
    """Encoded prompts with whatever a backbone's network needs beside them."""

    def __len__(self) -> int: ...

    def repeat(self, k: int) -> "Conditioning":
        """Each row k times in a row (b*k + i), for K points evaluated in one batch."""
        ...


class Backbone(Protocol):
    """A frozen diffusion model as the ODE dx/dsigma = drift(x, sigma). The only door to a model.

    Attributes:
        family: a solver fits models of its own family alone.
        model_id: as the user names it.
        form: of the ODE.
        schedule: the name in epd_ray.solvers.schedules.SCHEDULES of what `sigmas` gives.
        default_guidance: the guidance scale that its family is usually run with.
        facts: what a solver file keeps beside these, as JSON values: resolution, revision, scheduler, and
            `prompted` where that is false.
    """

    family: str
    model_id: str
    form: Form
    schedule: str
    default_guidance: float
    facts: Mapping[str, JsonValue]

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Conditioning:
        """Conditioning of length B for B prompts."""
        ...

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the model reads; their ends are cut."""
        ...

    def sigmas(self, num_intervals: int, *, final_zero: bool = False) -> Tensor:
        """The model's own schedule: [num_intervals + 1], float64, decreasing; ends at 0 only when `final_zero`."""
        ...

    def noise(self, seed: int) -> Tensor:
        """One unit-normal latent [...], float32, drawn on the CPU from the seed alone."""
        ...

    def initial(self, noise: Tensor) -> Tensor:
        """State at sigmas[0] from unit noise [B, ...]."""
        ...

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """dx/dsigma at x [B, ...], sigma [B]; float32; differentiable in x and sigma."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in [0, 1], on any device."""
        ...


class RewardHead(Protocol):
    """Scores pictures against prompts."""

    model_id: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W], float in [0, 1]; returns float32 [B]."""
        ...


class FeatureExtractor(Protocol):
    """Turns pictures into vectors that a metric compares.

    Attributes:
        model_id: as the user names it.
        revision: of the weights: features are kept under both.
        dimension: D.
    """

    model_id: str
    revision: str
    dimension: int

    def features(self, images: ImageArray) -> FloatArray:
        """images [B, 3, H, W], uint8; returns float32 [B, D]."""
        ...
