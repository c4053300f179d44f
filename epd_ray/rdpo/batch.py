"""An iteration's batch: what is asked for, and what comes back, joined by rollout id."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID, Columns
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

from epd_ray.policy.loss import Advantages, leave_one_out
from epd_ray.policy.minibatches import image_order
from epd_ray.randomness import Purpose, request_seeds, stream
from epd_ray.rdpo.learner import ADVANTAGES
from epd_ray.types import FloatArray, RolloutJob, RolloutRequest

if TYPE_CHECKING:
    from epd_ray.actors.pipeline import Outcome
    from epd_ray.rdpo.config import RDPOConfig

Row = dict[str, Any]
"""A rollout with its scores and advantage, as rollout_files.rollout_table takes it."""


def propose(config: "RDPOConfig", prompts: Sequence[str], iteration: int) -> list[tuple[RolloutRequest, ...]]:
    """An iteration's requests in jobs of fixed composition; a function of (seed, iteration).

    Args:
        config: P, G, the images per job, the groups' kind.
        prompts: to choose from.
        iteration: from 0.
    """
    seed = config.seed or 0
    rng = stream(Purpose.TRAINING, seed, iteration)
    shape = (config.prompts_per_iteration, config.group_size)
    chosen = rng.choice(len(prompts), shape[0], replace=len(prompts) < shape[0])
    noise = request_seeds(rng, shape)
    if config.same_latent:
        noise = np.repeat(noise[:, :1], shape[1], axis=1)
    action = request_seeds(rng, shape)
    requests = []
    for index in range(config.images_per_iteration):
        p, g = divmod(index, shape[1])
        # The reference reads its prompt-major batch as (G, P): "mixed" compares rows that share index mod P.
        group = p if config.baseline == "per_prompt" else index % shape[0]
        digest = hashlib.blake2b(f"{seed}:{iteration}:{index}".encode(), digest_size=8).hexdigest()
        prompt, seeds = prompts[chosen[p]], (int(noise[p, g]), int(action[p, g]))
        requests.append(RolloutRequest(digest, f"{iteration}-{group}", prompt, *seeds))
    size = config.images_per_job
    return [tuple(requests[i : i + size]) for i in range(0, len(requests), size)]


def join(
    jobs: Sequence[RolloutJob],
    outcomes: Sequence["Outcome"],
    mix: Callable[[Mapping[str, FloatArray]], FloatArray],
) -> tuple[list[Row], Advantages]:
    """Requests, rollouts and scores by rollout id, with rewards and advantages.

    Args:
        jobs: of one iteration.
        outcomes: theirs, in the same order.
        mix: raw scores of a job by head -> its rewards.
    """
    rows: list[Row] = []
    for job, outcome in zip(jobs, outcomes, strict=True):
        ids = [r.rollout_id for r in job.requests]
        images = {} if outcome.images is None else dict(zip(ids, outcome.images, strict=True))
        scores = {name: dict(zip(ids, values.tolist(), strict=True)) for name, values in outcome.scores.items()}
        rewards = dict(zip(ids, mix(outcome.scores).tolist(), strict=True))
        drawn = {r.rollout_id: r for r in outcome.value}
        for request in job.requests:
            rollout = drawn[request.rollout_id]
            rows.append(
                {
                    **vars(request),
                    **vars(rollout),
                    "iteration": job.job_id[0] + 1,
                    "policy_version": job.policy_version,
                    "rewards": {name: values[request.rollout_id] for name, values in scores.items()},
                    "reward": rewards[request.rollout_id],
                    "generate_seconds": outcome.generate_seconds / len(ids),
                    "score_seconds": outcome.score_seconds / len(ids),
                    "image": images.get(request.rollout_id),
                }
            )
    advantages = leave_one_out(torch.tensor([r["reward"] for r in rows]), [r["group_id"] for r in rows])
    for row, value in zip(rows, advantages.values.tolist(), strict=True):
        row["advantage"] = value
    return rows, advantages


def summarise(rows: Sequence[Row], advantages: Advantages, outcomes: Sequence["Outcome"]) -> dict[str, float]:
    """What is logged about a batch: rewards, their spread inside the groups, seconds that the workers spent in all."""
    raw = {head: [r["rewards"][head] for r in rows] for head in rows[0]["rewards"]}
    return {
        **{f"reward/{head}": float(np.mean(values)) for head, values in raw.items()},
        **{f"reward_std/{head}": float(np.std(values)) for head, values in raw.items()},
        "reward/mean": float(np.mean([r["reward"] for r in rows])),
        "reward/group_std": advantages.group_spread,
        "reward/silent_groups": float(advantages.silent_groups),
        "time/generate": sum(o.generate_seconds for o in outcomes),
        "time/score": sum(o.score_seconds for o in outcomes),
    }


def learner_arguments(config: "RDPOConfig", rows: Sequence[Row], job: RolloutJob) -> dict[str, Any]:
    """What RLlib's LearnerGroup.update takes for an iteration's rows.

    All epochs lie in one batch, one after another, and RLlib goes through it once: its own shuffling would draw from
    NumPy's global state.

    Args:
        config: of the update.
        rows: B, in their order.
        job: one of the iteration's, for its number and policy.
    """
    iteration = job.job_id[0]
    shape = (len(rows), *job.parameters.shape[:1], config.space.action_width)
    order = image_order(config.seed or 0, iteration, len(rows), config.num_epochs, config.shuffle_batch_per_epoch)
    batch = SampleBatch(
        {
            Columns.OBS: np.zeros((len(order), 1), np.float32),
            Columns.ACTIONS: np.array([r["action"] for r in rows], np.float32).reshape(shape)[order],  # [E B, N, A]
            Columns.ACTION_LOGP: np.array([r["log_prob"] for r in rows], np.float64)[order],
            ADVANTAGES: np.array([r["advantage"] for r in rows], np.float32)[order],
        }
    )
    steps = {
        "iteration": iteration,
        "staleness": iteration - job.policy_version,
        "images": iteration * len(rows),
        NUM_ENV_STEPS_SAMPLED_LIFETIME: (iteration + 1) * len(rows),
    }
    return {
        "batch": MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(rows)),
        "timesteps": steps,
        "num_epochs": 1,
        "minibatch_size": min(config.minibatch_size, len(rows)),
        "shuffle_batch_per_epoch": False,
    }
