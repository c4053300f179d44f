"""RDPO as a plain program: one process, one thing after another. What the pipeline of actors is measured against."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.bench.timing import now
from epd_ray.drawing.sampler import to_uint8
from epd_ray.drawing.worker import RolloutWorker, log_prob
from epd_ray.policy.dirichlet import TableDistribution, clamp_scale_time
from epd_ray.policy.loss import clipped_surrogate, leave_one_out
from epd_ray.policy.minibatches import image_order
from epd_ray.policy.network import PolicyNetwork
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rewards.scoring import Scorer
from epd_ray.solvers import epd
from epd_ray.solvers.conditioned import conditioned_drift, noises
from epd_ray.types import Drift, FloatArray, ImageArray, RolloutRequest

STAGES = ("draw", "encode", "solve", "decode", "score", "update")
Answer = TypeVar("Answer")


def one_after_another(drift: Drift, batch: int) -> Drift:
    """A drift that takes K points a sample as K calls of `batch` rows, as the reference's sampler does.

    Args:
        drift: of the backbone.
        batch: B; a call with more rows has B * K, row b * K + k.
    """

    def apart(x: Tensor, sigma: Tensor) -> Tensor:
        points = len(x) // batch
        if points == 1:
            return drift(x, sigma)
        parts = [drift(x[k::points], sigma[k::points]) for k in range(points)]
        return torch.stack(parts, 1).flatten(0, 1)  # K x [B, ...] -> [B * K, ...]

    return apart


class PlainLoop:
    """One RDPO iteration after another, in the manner of the method's published code.

    Its sampler calls the network for one point of an interval after another, both halves of guidance in one call. It
    encodes the prompts of every batch anew, scores one picture at a time, and overlaps nothing. Requests, loss and
    optimiser are those of `RDPO`, so that both do the same work.

    Args:
        config: of the run; its learning rate is constant.
        worker: with the frozen model and its guidance scale, as a rollout actor has it.
        scorer: the only reward.
        prompts: to train on.
    """

    def __init__(self, config: RDPOConfig, worker: RolloutWorker, scorer: Scorer, prompts: Sequence[str]) -> None:
        self._config, self._backbone, self._guidance = config, worker.backbone, worker.guidance_scale
        self._scorer = scorer
        self._prompts = prompts
        self.network = PolicyNetwork(config.policy_spec)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.seconds: dict[str, float] = {}

    def iterate(self, iteration: int, at_once: int) -> list[ImageArray]:
        """Draw, score and learn from one iteration's images; `seconds` then holds what each stage took.

        Args:
            iteration: from 0.
            at_once: pictures that the network draws together.

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
        start = now()
        answer = call()
        self.seconds[stage] += now() - start
        return answer

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
        drift = one_after_another(conditioned_drift(b, conditioning), len(requests))
        with torch.inference_mode():
            x = b.initial(noises(b, [r.noise_seed for r in requests]))
            latents = self._clock(
                "solve",
                lambda: epd(drift, x, sigmas, table, afs=sampler.afs, order=sampler.order, form=b.form),
            )
        images: ImageArray = self._clock("decode", lambda: to_uint8(b.decode(latents)).numpy())
        return actions, images

    def _score(self, images: ImageArray, requests: Sequence[RolloutRequest]) -> FloatArray:
        scores = [self._scorer.score(images[i : i + 1], [r.prompt], [r.rollout_id]) for i, r in enumerate(requests)]
        return np.concatenate(scores)

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
        order = image_order(c.seed or 0, iteration, len(actions), c.num_epochs, c.shuffle_batch_per_epoch)
        for rows in torch.from_numpy(order).split(min(c.minibatch_size, len(actions))):
            policy = TableDistribution(c.space, self.network())
            found = clipped_surrogate(log_prob(policy, actions[rows]), old[rows], advantages[rows], c.clip_param)
            self._optimizer.zero_grad()
            found.loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), c.grad_clip)
            self._optimizer.step()
