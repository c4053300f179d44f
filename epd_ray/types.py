"""Records and protocols that several packages share. Records are frozen; rows are joined by id, never by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

if TYPE_CHECKING:  # torch takes more than a second to import, and reading a configuration needs none of it
    from torch import Tensor

Drift = Callable[["Tensor", "Tensor"], "Tensor"]
"""A function that returns dx/dsigma at x [B, ...] and sigma [B], with the shape and dtype of x."""

Form = Literal["ve", "flow"]
"""How noise enters x: "ve" is clean + sigma * noise; "flow" is (1 - sigma) * clean + sigma * noise."""

Metadata = Mapping[str, JsonValue]
"""The columns of a prompt's row that reward heads read, by name; cells of .csv and .tsv files are text."""


@runtime_checkable
class GuidableDrift(Protocol):
    """A drift whose guidance can be set for one evaluation after another."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor: ...

    def at(self, scale: Tensor | None, reuse: bool) -> Drift:
        """The drift at a guidance scale.

        Args:
            scale: a number, or one for each of B samples; a scale of at most 1 leaves out the pass without the prompt.
                None takes the scale that the model is run with.
            reuse: whether the pass without the prompt is left out at any scale, and the difference that the prompt
                makes is that of the last evaluation that had both passes.
        """
        ...


FloatArray = npt.NDArray[np.float32]
ImageArray = npt.NDArray[np.uint8]

OnImages = Callable[[int, ImageArray], None]
"""on_images(first, images): a batch of pictures [b, 3, H, W], those of the prompts from number `first` on.

It is called once for each batch, as the batches come, in any order.
"""


@dataclass(frozen=True)
class RolloutRequest:
    """Everything that determines one image, apart from the policy parameters of its job.

    Attributes:
        rollout_id: hash of (run seed, iteration, index), unique in a run.
        group_id: rollouts with the same group_id have their rewards compared with each other.
        prompt: text that the model is given.
        noise_seed: seed of the initial noise.
        action_seed: seed with which the solver table is sampled from the policy.
    """

    rollout_id: str
    group_id: str
    prompt: str
    noise_seed: int
    action_seed: int


@dataclass(frozen=True)
class RolloutJob:
    """A batch of requests for one rollout actor. The number of actors has no influence on how requests are batched.

    Attributes:
        job_id: (iteration, shard).
        policy_version: number of learner updates that led to `parameters`.
        parameters: [N, W] float32, the policy's output in the order that epd_ray.policy.dirichlet gives. Actors receive
            no other weights of the policy.
        requests: in a fixed order.
        reuse: [N], whether an interval of every table reuses the difference that the prompt makes; empty stands for
            what the worker was built with.
    """

    job_id: tuple[int, int]
    policy_version: int
    parameters: FloatArray
    requests: tuple[RolloutRequest, ...]
    reuse: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """The action that a rollout actor sampled for one request, and the solver table that follows from it.

    Attributes:
        rollout_id: id of the request.
        action: [N, A] float32: see epd_ray.policy.dirichlet: segments (K+1 columns, or K with a start point), weights
            (K), trained scales (K each), and the further parts that are trained.
        log_prob: log probability of the action under the job's parameters, summed over intervals.
        positions: [N, K] float32 in [0, 1], where the table's points lie in each interval.
        weights: [N, K] float32, the points' weights; each row sums to 1.
        scale_dir: [N, K] float32; None when direction scales are not trained.
        scale_time: [N, K] float32; None when time scales are not trained.
        grid: [N] float32, each interval's share of the schedule; None when the grid is not trained.
        history: [N, H] float32, the weights of earlier drifts; None when they are not trained.
        guidance: [N] float32, each interval's guidance scale; None when guidance is not trained.
    """

    rollout_id: str
    action: FloatArray
    log_prob: float
    positions: FloatArray
    weights: FloatArray
    scale_dir: FloatArray | None = None
    scale_time: FloatArray | None = None
    grid: FloatArray | None = None
    history: FloatArray | None = None
    guidance: FloatArray | None = None


@dataclass(frozen=True)
class Sampled:
    """Pictures sampled for evaluation, with their scores.

    Attributes:
        scores: maps each reward head to its raw scores [B], in the order of the prompts; NaN where it does not judge a
            prompt.
        reward: [B], the weighted mean over the heads that judge the prompt.
        seconds: working time of the rollout actors, summed over actors.
    """

    scores: dict[str, FloatArray]
    reward: FloatArray
    seconds: float


class Conditioning(Protocol):
    """Encoded prompts, with any other input that a backbone's network needs."""

    def __len__(self) -> int: ...

    def repeat(self, k: int) -> Conditioning:
        """Repeat each row k times: row b becomes rows b*k to b*k + k - 1, so that one batch can hold K points."""
        ...


class Backbone(Protocol):
    """A frozen diffusion model as the ODE dx/dsigma = drift(x, sigma). All other code uses models through this alone.

    Attributes:
        family: name of the model family; a solver works only with models of its own family.
        model_id: directory or hub id, as the user gave it.
        form: how noise enters x.
        schedule: name, in epd_ray.solvers.schedule_names.SCHEDULES, of the schedule that `sigmas` returns.
        default_guidance: guidance scale that models of this family usually run with.
        classifier_free: whether a guidance scale above 1 takes a second pass of the network, without the prompt.
        facts: further JSON values for solver files: resolution, revision, scheduler, and `prompted` if that is false.
    """

    family: str
    model_id: str
    form: Form
    schedule: str
    default_guidance: float
    classifier_free: bool
    facts: Mapping[str, JsonValue]

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Conditioning:
        """Encode B prompts into a conditioning of length B."""
        ...

    def truncated(self, prompts: Sequence[str]) -> int:
        """The number of prompts that are longer than the text encoder's limit and are truncated."""
        ...

    def sigmas(self, num_intervals: int, *, final_zero: bool = False) -> Tensor:
        """The model's own schedule [num_intervals + 1], float64, decreasing; it ends at 0 only if `final_zero`."""
        ...

    def noise(self, seed: int) -> Tensor:
        """One latent [...] of standard normal noise, float32, drawn on the CPU; it depends on the seed alone."""
        ...

    def initial(self, noise: Tensor) -> Tensor:
        """The state x [B, ...] at sigmas[0], made from standard normal noise [B, ...]."""
        ...

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """dx/dsigma at x [B, ...] and sigma [B], float32, differentiable in both."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in [0, 1], on any device."""
        ...


@runtime_checkable
class Guidable(Protocol):
    """What a backbone has beside `Backbone` where its guidance can differ between evaluations."""

    def guided(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, scale: Tensor | None, difference: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The drift at a guidance scale of its own.

        Args:
            x: [B, ...], the state.
            sigma: [B].
            conditioning: B encoded prompts.
            scale: a number or [B]; None takes the scale that the prompts were encoded for.
            difference: the difference [B, ...] between the drifts with and without the prompt, which an earlier
                evaluation found; the pass without the prompt is then left out. None asks for both passes.

        Returns:
            dx/dsigma [B, ...], float32, and the difference that both passes found; None after a single pass.

        Raises:
            TableError: a scale above 1 for prompts that were encoded without guidance.
        """
        ...


@dataclass(frozen=True)
class Grid:
    """The noise levels of a solver, and the noise that it begins with.

    Attributes:
        sigmas: [N+1], float64, decreasing, >= 0.
        start: the standard deviation of x at sigmas[0], where x is noise alone; None for that of `Backbone.initial`.
    """

    sigmas: Tensor
    start: float | None = None


@runtime_checkable
class Pipelined(Protocol):
    """What a backbone has beside `Backbone` where a diffusers pipeline stands behind it.

    Attributes:
        shift: the factor by which the pipeline shifts the noise levels of a flow; None in VE form.
        published: whether a paper publishes noise levels for the model.
    """

    @property
    def shift(self) -> float | None: ...

    @property
    def published(self) -> bool: ...

    def scheduler_grid(
        self, scheduler: str, num_intervals: int, *, final_zero: bool, changes: Mapping[str, Any]
    ) -> Grid:
        """The noise levels that a diffusers scheduler makes, as `from_config` of the pipeline's scheduler gives it.

        Args:
            scheduler: the name of the class.
            num_intervals: N.
            final_zero: whether a 0 at the end is kept; else the levels are those of N + 1 steps without it.
            changes: further arguments of `from_config`; "shift" is the factor of a flow, under any class's name for it.

        Raises:
            ScheduleError: the scheduler does not make N + 1 decreasing levels, or refuses an argument.
        """
        ...

    def published_grid(self, name: str, num_intervals: int) -> Grid:
        """The noise levels that a paper publishes for this model, interpolated to N intervals.

        Raises:
            ScheduleError: there are none for this model.
        """
        ...


class RewardHead(Protocol):
    """A model that scores how well pictures match their prompts, or how much people would like them.

    Attributes:
        model_id: directory or hub id of the model, as the user gave it.
    """

    model_id: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W], float in [0, 1], against B prompts; returns float32 [B]."""
        ...


@runtime_checkable
class ReadsRows(Protocol):
    """A reward head that also reads columns of the row in which a prompt stands; other heads lack `needs`.

    Attributes:
        needs: names of the columns that it reads; each is in every row that it is given.
    """

    needs: tuple[str, ...]

    def score(self, images: Tensor, prompts: Sequence[str], *, rows: Sequence[Metadata] | None = None) -> Tensor:
        """As RewardHead.score; `rows` holds the columns of B rows, in the order of the prompts."""
        ...


@runtime_checkable
class Costly(Protocol):
    """A reward head that counts what its scores cost."""

    @property
    def costs(self) -> Mapping[str, int]:
        """What it has cost since it was built by name, such as prompt_tokens."""
        ...


@runtime_checkable
class NeedsByOptions(Protocol):
    """The class of a reward head whose options decide which columns it reads."""

    def needs_with(self, options: Mapping[str, JsonValue]) -> tuple[str, ...]:
        """The names of the columns that the head reads when it is built with these options."""
        ...


class FeatureExtractor(Protocol):
    """A network that turns pictures into feature vectors, which metrics such as FID compare.

    Attributes:
        model_id: name of the network, as the user gave it.
        revision: revision of its weights; stored features are keyed by model_id and revision.
        dimension: length D of a feature vector.
    """

    model_id: str
    revision: str
    dimension: int

    def features(self, images: ImageArray) -> FloatArray:
        """The feature vectors [B, D], float32, of images [B, 3, H, W], uint8."""
        ...
