"""RDPO as a plain program in one process, one stage after another: the pipeline of actors is measured against it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.bench.models import scorers
from epd_ray.bench.timing import timed
from epd_ray.drawing.sampler import finite_pictures
from epd_ray.drawing.worker import RolloutWorker, log_prob
from epd_ray.policy.dirichlet import TableDistribution, clamp_scale_time
from epd_ray.policy.loss import clipped_surrogate, leave_one_out
from epd_ray.policy.minibatches import image_order
from epd_ray.policy.network import PolicyNetwork
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.solvers.epd import epd
from epd_ray.types import Drift, FloatArray, ImageArray, RolloutRequest

STAGES = ("draw", "encode", "solve", "decode", "score", "update")
Answer = TypeVar("Answer")


def one_after_another(drift: Drift, batch: int) -> Drift:
    """A drift that evaluates the K points of each sample in K calls of `batch` rows, as the reference's sampler does.

    Args:
        drift: the drift of the backbone.
        batch: B; a call with more rows than this has B * K rows, of which row b * K + k is point k of sample b.
    """

    def apart(x: Tensor, sigma: Tensor) -> Tensor:
        points = len(x) // batch
        if points == 1:
            return drift(x, sigma)
        parts = [drift(x[k::points], sigma[k::points]) for k in range(points)]
        return torch.stack(parts, 1).flatten(0, 1)  # K x [B, ...] -> [B * K, ...]

    return apart


class PlainLoop:
    """RDPO iterations one after another, in the manner of the papers' published code.

    The points of an interval are evaluated one after another, and both halves of guidance in one call. The prompts of
    every batch are encoded anew, pictures are scored one at a time, and no two stages overlap. Requests, rewards, loss
    and optimizer are those of `RDPO` with staleness 0, so that both learn the same.

    Args:
        config: configuration of the run.
        worker: the frozen model with its guidance scale, as a rollout actor has it.
        prompts: the training prompts.

    Attributes:
        network: the policy.
        seconds: seconds of each stage in the last iteration, by the names in STAGES.
    """

    def __init__(self, config: RDPOConfig, worker: RolloutWorker, prompts: Sequence[str]) -> None:
        self._config, self._backbone, self._guidance = config, worker.backbone, worker.guidance_scale
        self._prompts = prompts
        self._scorers, self._mixer = scorers(config.reward_specs), config.mixer()
        self.network = PolicyNetwork(config.policy_spec)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), weight_decay=config.weight_decay)
        self.seconds: dict[str, float] = {}

    def iterate(self, iteration: int, at_once: int) -> list[ImageArray]:
        """Draw, score and learn from the images of one iteration.

        Args:
            iteration: number of the iteration, from 0.
            at_once: number of pictures that the network draws together.

        Returns:
            The pictures, uint8 [at_once, 3, H, W] each.
        """
        self.seconds = dict.fromkeys(STAGES, 0.0)
        requests = [r for job in propose(self._config.batch_plan, self._prompts, iteration) for r in job]
        policy = self._clock("draw", self._policy)
        drawn = [self._draw(policy, requests[i : i + at_once]) for i in range(0, len(requests), at_once)]
        pictures = [images for _, images in drawn]
        rewards = self._clock("score", lambda: self._score(np.concatenate(pictures), requests))
        actions = torch.cat([actions for actions, _ in drawn])
        self._clock("update", lambda: self._update(iteration, actions, policy, rewards, requests))
        return pictures

    def _clock(self, stage: str, call: Callable[[], Answer]) -> Answer:
        found = timed(call)
        self.seconds[stage] += found.seconds
        return found.answer

    @torch.no_grad()
    def _policy(self) -> TableDistribution:
        return TableDistribution(self._config.space, self.network())

    def _draw(self, policy: TableDistribution, requests: Sequence[RolloutRequest]) -> tuple[Tensor, ImageArray]:
        """Actions [b, N, A] and pictures [b, 3, H, W] of b requests."""
        b, sampler = self._backbone, self._config.worker_spec.sampler
        sigmas = b.sigmas(sampler.intervals)
        actions = self._clock(
            "draw", lambda: torch.stack([torch.from_numpy(policy.draw(r.action_seed)) for r in requests])
        )
        table = clamp_scale_time(policy.space.table(actions), sigmas, b.form)
        if isinstance(b, PipelineBackbone):
            b.embeddings.clear()
        conditioning = self._clock("encode", lambda: b.encode([r.prompt for r in requests], self._guidance))
        drift = one_after_another(ConditionedDrift(b, conditioning), len(requests))
        with torch.inference_mode():
            x = b.initial(noises(b, [r.noise_seed for r in requests]))
            latents = self._clock(
                "solve",
                lambda: epd(drift, x, sigmas, table, afs=sampler.afs, order=sampler.order, form=b.form),
            )
        images: ImageArray = self._clock("decode", lambda: finite_pictures(b, latents).numpy())
        return actions, images

    def _score(self, images: ImageArray, requests: Sequence[RolloutRequest]) -> FloatArray:
        """Rewards [B] of pictures [B, 3, H, W], mixed from the heads as `RDPO` does."""
        scores = {
            scorer.name: np.concatenate(
                [scorer.score(images[i : i + 1], [r.prompt], [r.rollout_id]) for i, r in enumerate(requests)]
            )
            for scorer in self._scorers
        }
        self._mixer.observe([scores])
        return self._mixer.train(scores, [r.prompt for r in requests])

    def _update(
        self,
        iteration: int,
        actions: Tensor,
        behaviour: TableDistribution,
        rewards: FloatArray,
        requests: Sequence[RolloutRequest],
    ) -> None:
        c = self._config
        old = log_prob(behaviour, actions)
        advantages = leave_one_out(torch.from_numpy(rewards), [r.group_id for r in requests]).values
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(iteration)
        order = image_order(c.seed or 0, iteration, len(actions), c.num_epochs, c.shuffle_batch_per_epoch)
        for rows in torch.from_numpy(order).split(min(c.minibatch_size, len(actions))):
            loss = self._loss(actions[rows], old[rows], advantages[rows])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), c.grad_clip)
            self._optimizer.step()

    def _learning_rate(self, iteration: int) -> float:
        """The rate of an iteration, by RLlib's rule for a schedule: linear between the given numbers of images."""
        if isinstance(self._config.lr, float | int):
            return self._config.lr
        images, rates = zip(*self._config.lr, strict=True)
        return float(np.interp(iteration * self._config.batch_plan.images, images, rates))

    def _loss(self, actions: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
        """The learner's loss of a minibatch: the clipped surrogate, KL to the base table, and entropy."""
        c = self._config
        policy = TableDistribution(c.space, self.network())
        surrogate = clipped_surrogate(log_prob(policy, actions), old_log_prob, advantages, c.clip)
        kl_to_base = policy.kl_per_interval(TableDistribution(c.space, self.network.base)).sum()
        entropy = policy.entropy_per_interval().sum()
        return surrogate.loss + c.kl_coeff * kl_to_base - c.entropy_coeff * entropy
