"""The work of a rollout actor: draw tables and pictures. Every answer depends on the request alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import JsonValue

from epd_ray.drawing.sampler import Sampler, alike, to_uint8
from epd_ray.errors import ModelError, TableError, shown
from epd_ray.policy.dirichlet import TableDistribution, TableSpace, clamp_scale_time
from epd_ray.solvers.conditioned import noises
from epd_ray.stage_one.gradient import Loss, distill_loss
from epd_ray.stage_one.grid import LocalErrors, local_errors
from epd_ray.stage_one.least_squares import NormalEquations, equations_with_history, normal_equations
from epd_ray.stage_one.reuse import Changes, changes
from epd_ray.stage_one.shard import Points, Shard, ShardStates
from epd_ray.types import Backbone, Form, Guidable, ImageArray, Pipelined, Rollout, RolloutJob


@dataclass(frozen=True)
class BackboneFacts:
    """What the driver needs to know about a model that only the actors load.

    Attributes:
        family: the backbone's family.
        model_id: the model as the user names it.
        form: how noise enters x, "ve" or "flow".
        sigmas: [N+1], the schedule of the policy's solver.
        guidance_scale: the guidance scale of all pictures.
        classifier_free: whether a guidance scale above 1 takes a second pass of the network, without the prompt.
        more: the backbone's further facts, such as resolution, revision and scheduler, as JSON values.
        shift: the factor by which the model's pipeline shifts a flow's noise levels; None where there is none.
        published: whether a paper publishes noise levels for the model.
        guidable: whether guidance can differ between evaluations.
    """

    family: str
    model_id: str
    form: Form
    sigmas: tuple[float, ...]
    guidance_scale: float
    classifier_free: bool
    more: Mapping[str, JsonValue]
    shift: float | None = None
    published: bool = False
    guidable: bool = False


def require_guidance(facts: BackboneFacts, *, scales: bool, reuse: bool) -> None:
    """Refuse the parts of a table that are about guidance for a model that cannot follow them.

    Args:
        facts: what the rollout actors report about the model.
        scales: whether each interval has a guidance scale of its own.
        reuse: whether intervals leave out the pass without the prompt.

    Raises:
        TableError: the model has no guidance that could differ between evaluations, no such pass, or no guidance.
    """
    off = "set solver.guidance=false and solver.reuse=0"
    if (scales or reuse) and not facts.guidable:
        raise TableError(
            f"guidance is learned or reused, but a model of family {facts.family} has none that could differ between "
            f"evaluations: {off}"
        )
    if reuse and not facts.classifier_free:
        raise TableError(
            f"solver.reuse leaves out passes without the prompt, but a model of family {facts.family} makes none: set "
            "solver.reuse=0"
        )
    if (scales or reuse) and facts.guidance_scale <= 1:
        raise TableError(
            f"guidance is learned or reused, but the guidance scale is {facts.guidance_scale:g}, above 1 is needed: "
            f"set backbone.guidance_scale, or {off}"
        )


@dataclass(frozen=True)
class Generated:
    """The rollouts of a job and their images [B, 3, H, W], uint8, both in the order of the requests."""

    rollouts: tuple[Rollout, ...]
    images: ImageArray


class RolloutWorker:
    """Draws tables and pictures with one backbone.

    Args:
        backbone: the frozen model.
        guidance_scale: the guidance scale of all pictures.
        space: which numbers of a table the policy draws.
        sampler: the solver in which the drawn tables are used: its number of intervals, first step and order.
    """

    def __init__(self, backbone: Backbone, guidance_scale: float, space: TableSpace, sampler: Sampler) -> None:
        self.backbone, self.guidance_scale, self.space, self.sampler = backbone, guidance_scale, space, sampler

        self.states = ShardStates(backbone, guidance_scale)

    def describe(self, num_intervals: int) -> BackboneFacts:
        """The facts about the model, with its schedule for N intervals."""
        b = self.backbone
        sigmas = tuple(b.sigmas(num_intervals).tolist())
        return BackboneFacts(
            b.family,
            b.model_id,
            b.form,
            sigmas,
            self.guidance_scale,
            b.classifier_free,
            dict(b.facts),
            b.shift if isinstance(b, Pipelined) else None,
            isinstance(b, Pipelined) and b.published,
            isinstance(b, Guidable),
        )

    def steps(self, samplers: Sequence[Sampler]) -> list[tuple[float, ...]]:
        """The noise levels [N+1] of each sampler."""
        return [tuple(sampler.steps(self.backbone).tolist()) for sampler in samplers]

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the model reads."""
        return self.backbone.truncated(prompts)

    def distill(self, shard: Shard, grid: Sequence[float]) -> NormalEquations:
        """The least-squares problem of a shard, see epd_ray.stage_one.least_squares.normal_equations."""
        found = normal_equations(self.states.interval(shard), grid)
        return replace(found, passes=self.states.passes)

    def distill_whole(
        self, shard: Shard, positions: Sequence[float], scales: Sequence[float | None]
    ) -> list[NormalEquations]:
        """The least-squares problems of a shard with its earlier drifts, one for each guidance scale."""
        intervals = self.states.intervals(shard, scales)
        found = [equations_with_history(one, positions, shard.parts.history) for one in intervals]
        return [replace(found[0], passes=self.states.passes), *found[1:]]

    def distill_grid(self, shard: Shard) -> LocalErrors:
        """What the teacher's single steps miss, see epd_ray.stage_one.grid.local_errors."""
        found = local_errors(self.states.fine(shard))
        return replace(found, passes=self.states.passes)

    def distill_changes(self, shard: Shard) -> Changes:
        """How much the difference that the prompt makes changes between intervals, see epd_ray.stage_one.reuse."""
        found = changes(self.states.along(shard))
        return replace(found, passes=self.states.passes)

    def distill_loss(self, shard: Shard, points: Points, gradient: bool) -> Loss:
        """The loss of a shard and its gradient on request, see epd_ray.stage_one.gradient.distill_loss."""
        found = distill_loss(self.states.interval(shard, points), points, gradient)
        return replace(found, passes=self.states.passes)

    def generate(self, job: RolloutJob) -> Generated:
        """Draw a table and its picture for each request; the whole job is one batch."""
        policy = TableDistribution(self.space, torch.from_numpy(job.parameters.copy()))  # Ray's arrays are read-only
        actions = torch.stack([torch.from_numpy(policy.draw(r.action_seed)) for r in job.requests])  # [B, N, A]
        log_probs = log_prob(policy, actions)
        sigmas = self.backbone.sigmas(self.sampler.intervals)
        space = replace(self.space, reuse=job.reuse or self.space.reuse)
        table = clamp_scale_time(space.table(actions), sigmas, self.backbone.form)
        sampler = self.sampler.with_table(table)
        images = self.sample(sampler, [r.prompt for r in job.requests], [r.noise_seed for r in job.requests])
        columns = {
            name: values.float().numpy() for name, values in (table.columns() | table.interval_columns()).items()
        }
        rollouts = tuple(
            Rollout(request.rollout_id, action.numpy(), float(value), **{name: c[i] for name, c in columns.items()})
            for i, (request, action, value) in enumerate(zip(job.requests, actions, log_probs, strict=True))
        )
        return Generated(rollouts, images)

    def sample(self, sampler: Sampler, prompts: Sequence[str], noise_seeds: Sequence[int]) -> ImageArray:
        """Pictures [B, 3, H, W], uint8, one for each prompt with its seed.

        Raises:
            ModelError: a picture has values that are not finite.
        """
        scale = self.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale
        conditioning = self.backbone.encode(prompts, scale)
        starts = alike(self.backbone, prompts, noise_seeds, scale)
        with torch.inference_mode():
            latents = sampler.run(self.backbone, conditioning, noises(self.backbone, noise_seeds), starts)
        pictures = self.backbone.decode(latents)
        finite = pictures.flatten(1).isfinite().all(1).tolist()
        broken = [i for i, whole in enumerate(finite) if not whole]
        if broken:
            named = "; ".join(f"{shown(prompts[i])} with seed {noise_seeds[i]}" for i in broken[:3])
            raise ModelError(f"{len(broken)} pictures are not finite ({named}): use dtype float32, or a finer solver")
        images: ImageArray = to_uint8(pictures).numpy()
        return images


def log_prob(policy: TableDistribution, actions: torch.Tensor) -> torch.Tensor:
    """Log-density [B] of actions [B, N, A], computed in float64 so that rollout and learner agree to 1e-5."""
    exact = TableDistribution(policy.space, policy.parameters.double())
    return exact.log_prob(actions.double())
