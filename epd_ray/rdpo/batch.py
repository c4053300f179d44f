"""The batch of an iteration: the requests that it makes, and the answers that come back, joined by rollout id."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID, Columns
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

from epd_ray.actors.pipeline import Outcome
from epd_ray.policy.loss import Advantages, leave_one_out
from epd_ray.policy.minibatches import image_order
from epd_ray.randomness import Purpose, request_seeds, stream
from epd_ray.rdpo.learner import ADVANTAGES
from epd_ray.types import FloatArray, ImageArray, Rollout, RolloutJob, RolloutRequest

Baseline = Literal["per_prompt", "mixed"]


@dataclass(frozen=True)
class BatchPlan:
    """What decides the requests of every iteration.

    Attributes:
        seed: seed of the run.
        prompts_per_iteration: P, the number of prompts that an iteration draws.
        group_size: G, the number of pictures of each prompt.
        images_per_job: the number of pictures that one call of a rollout actor draws.
        same_latent: whether the pictures of a prompt start from the same noise.
        baseline: "per_prompt" compares the pictures of a prompt with each other. "mixed" compares pictures of different
            prompts, as the reference code does.
    """

    seed: int
    prompts_per_iteration: int
    group_size: int
    images_per_job: int
    same_latent: bool
    baseline: Baseline

    @property
    def images(self) -> int:
        """The number of pictures in an iteration, P * G."""
        return self.prompts_per_iteration * self.group_size


@dataclass(frozen=True)
class UpdatePlan:
    """How the learner goes through the pictures of an iteration.

    Attributes:
        seed: seed of the run.
        epochs: the number of passes over the pictures.
        minibatch: the number of pictures in a gradient step.
        shuffle: whether the passes after the first one take the pictures in a random order.
    """

    seed: int
    epochs: int
    minibatch: int
    shuffle: bool


@dataclass(frozen=True)
class ScoredRollout:
    """A picture that was drawn and scored, and what is learned from it.

    Attributes:
        request: what decided the picture.
        rollout: the table that it was drawn with, and its log-probability.
        iteration: the number of the iteration, from 1.
        policy_version: the number of updates of the policy that drew the table.
        rewards: the raw score of each head, by the head's name; None where it does not judge the prompt.
        reward: the mix of the scores that is learned from.
        advantage: the reward in comparison with its group, normalised over the batch.
        generate_seconds: an equal share of the seconds that the rollout actor took for the job.
        score_seconds: an equal share of the seconds that the slowest head took for the job.
        image: [3, H, W] uint8 where pictures are kept, else None.
    """

    request: RolloutRequest
    rollout: Rollout
    iteration: int
    policy_version: int
    rewards: Mapping[str, float | None]
    reward: float
    advantage: float
    generate_seconds: float
    score_seconds: float
    image: ImageArray | None

    def record(self) -> dict[str, Any]:
        """One flat row, as epd_ray.storage.rollouts.rollout_table takes it."""
        own = {name: value for name, value in vars(self).items() if name not in ("request", "rollout")}
        return {**vars(self.request), **vars(self.rollout), **own}


def propose(plan: BatchPlan, prompts: Sequence[str], iteration: int) -> list[tuple[RolloutRequest, ...]]:
    """The requests of an iteration, in jobs whose composition is fixed; a function of the seed and the iteration.

    Args:
        plan: what decides the requests.
        prompts: the training prompts that the iteration chooses from.
        iteration: the number of the iteration, from 0.

    Returns:
        One tuple of requests for each job.
    """
    rng = stream(Purpose.TRAINING, plan.seed, iteration)
    shape = (plan.prompts_per_iteration, plan.group_size)
    chosen = rng.choice(len(prompts), shape[0], replace=len(prompts) < shape[0])
    noise = request_seeds(rng, shape)
    if plan.same_latent:
        noise = np.repeat(noise[:, :1], shape[1], axis=1)
    action = request_seeds(rng, shape)
    requests = []
    for index in range(plan.images):
        p, g = divmod(index, shape[1])
        # The reference reads its prompt-major batch as (G, P): "mixed" compares rows that share index mod P.
        group = p if plan.baseline == "per_prompt" else index % shape[0]
        digest = hashlib.blake2b(f"{plan.seed}:{iteration}:{index}".encode(), digest_size=8).hexdigest()
        prompt, seeds = prompts[chosen[p]], (int(noise[p, g]), int(action[p, g]))
        requests.append(RolloutRequest(digest, f"{iteration}-{group}", prompt, *seeds))
    size = plan.images_per_job
    return [tuple(requests[i : i + size]) for i in range(0, len(requests), size)]


def join(
    jobs: Sequence[RolloutJob],
    outcomes: Sequence[Outcome],
    mix: Callable[[Mapping[str, FloatArray], Sequence[str]], FloatArray],
) -> tuple[list[ScoredRollout], Advantages]:
    """Requests, rollouts and scores joined by rollout id, with rewards and advantages.

    Args:
        jobs: the jobs of one iteration.
        outcomes: the outcome of each job, in the same order.
        mix: turns the raw scores of a job, by head, and its prompts into its rewards.

    Returns:
        One record for each picture, in the order of the requests, and the advantages of the batch.
    """
    prompts = [[request.prompt for request in job.requests] for job in jobs]
    rewards = [mix(outcome.scores, texts).tolist() for outcome, texts in zip(outcomes, prompts, strict=True)]
    advantages = leave_one_out(
        torch.tensor([reward for of_job in rewards for reward in of_job]),
        [request.group_id for job in jobs for request in job.requests],
    )
    values = iter(advantages.values.tolist())
    scored: list[ScoredRollout] = []
    for job, outcome, of_job in zip(jobs, outcomes, rewards, strict=True):
        scored += _join_job(job, outcome, of_job, [next(values) for _ in of_job])
    return scored, advantages


def _join_job(
    job: RolloutJob, outcome: Outcome, rewards: Sequence[float], advantages: Sequence[float]
) -> list[ScoredRollout]:
    ids = [request.rollout_id for request in job.requests]
    drawn = {rollout.rollout_id: rollout for rollout in outcome.value}
    scores = {head: dict(zip(ids, values.tolist(), strict=True)) for head, values in outcome.scores.items()}
    images = {} if outcome.images is None else dict(zip(ids, outcome.images, strict=True))
    return [
        ScoredRollout(
            request=request,
            rollout=drawn[request.rollout_id],
            iteration=job.job_id[0] + 1,
            policy_version=job.policy_version,
            rewards={
                head: None if np.isnan(v := of_head[request.rollout_id]) else v for head, of_head in scores.items()
            },
            reward=reward,
            advantage=advantage,
            generate_seconds=outcome.generate_seconds / len(ids),
            score_seconds=outcome.score_seconds / len(ids),
            image=images.get(request.rollout_id),
        )
        for request, reward, advantage in zip(job.requests, rewards, advantages, strict=True)
    ]


def summarise(
    rollouts: Sequence[ScoredRollout], advantages: Advantages, outcomes: Sequence[Outcome]
) -> dict[str, float]:
    """The metrics of a batch: rewards, their spread inside the groups, and the seconds that all actors worked.

    A head that judged no picture of the batch has no metrics in it.
    """
    given = {head: [rollout.rewards[head] for rollout in rollouts] for head in rollouts[0].rewards}
    judged = {head: [value for value in values if value is not None] for head, values in given.items()}
    raw = {head: values for head, values in judged.items() if values}
    return {
        **{f"reward/{head}": float(np.mean(values)) for head, values in raw.items()},
        **{f"reward_std/{head}": float(np.std(values)) for head, values in raw.items()},
        "reward/mean": float(np.mean([rollout.reward for rollout in rollouts])),
        "reward/group_std": advantages.group_spread,
        "reward/silent_groups": float(advantages.silent_groups),
        "time/generate": sum(outcome.generate_seconds for outcome in outcomes),
        "time/score": sum(outcome.score_seconds for outcome in outcomes),
    }


def learner_arguments(plan: UpdatePlan, rollouts: Sequence[ScoredRollout], job: RolloutJob) -> dict[str, Any]:
    """The arguments of RLlib's LearnerGroup.update for the rollouts of an iteration.

    All epochs lie in one batch, one after another, and RLlib goes through it once: its own shuffling would draw from
    NumPy's global state.

    Args:
        plan: how the learner goes through the rollouts.
        rollouts: B rollouts, in the order of their requests.
        job: any job of the iteration, which names the iteration and the policy.
    """
    iteration, count = job.job_id[0], len(rollouts)
    order = image_order(plan.seed, iteration, count, plan.epochs, plan.shuffle)  # [E * B]
    batch = SampleBatch(
        {
            Columns.OBS: np.zeros((len(order), 1), np.float32),
            Columns.ACTIONS: np.array([r.rollout.action for r in rollouts], np.float32)[order],  # [E * B, N, A]
            Columns.ACTION_LOGP: np.array([r.rollout.log_prob for r in rollouts], np.float64)[order],
            ADVANTAGES: np.array([r.advantage for r in rollouts], np.float32)[order],
        }
    )
    steps = {
        "iteration": iteration,
        "staleness": iteration - job.policy_version,
        "images": iteration * count,
        NUM_ENV_STEPS_SAMPLED_LIFETIME: (iteration + 1) * count,
    }
    return {
        "batch": MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=count),
        "timesteps": steps,
        "num_epochs": 1,
        "minibatch_size": min(plan.minibatch, count),
        "shuffle_batch_per_epoch": False,
    }
