"""Advantages and the clipped surrogate: pure functions on tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD_FLOOR = 1e-6  # a smaller standard deviation of a group's rewards is taken for rounding
STD_FLOOR = 1e-8


@dataclass(frozen=True)
class Advantages:
    """Leave-one-out advantages of a batch.

    Attributes:
        values: [B], divided by their standard deviation over the batch.
        group_spread: mean over groups of the population standard deviation of the reward.
        silent_groups: number of groups with a standard deviation below 1e-6; their advantages are 0.
    """

    values: Tensor
    group_spread: float
    silent_groups: int


def leave_one_out(rewards: Tensor, group_ids: Sequence[str]) -> Advantages:
    """Each reward minus the mean of the other rewards in its group, divided by the standard deviation over the batch.

    Args:
        rewards: [B], finite.
        group_ids: the group of each row; groups may be in any order.

    Raises:
        ValueError: a group has only one rollout.

    Source: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(group_ids):
        members.setdefault(group, []).append(row)
    rewards = rewards.double()
    values = torch.zeros_like(rewards)
    spreads = []
    for group, rows in members.items():
        size = len(rows)
        if size < 2:
            raise ValueError(f"group {group} has 1 rollout, leave-one-out needs 2 or more")
        inside = rewards[rows]
        spread = float(inside.std(correction=0))
        spreads.append(spread)
        if spread >= SPREAD_FLOOR:
            values[rows] = (inside - inside.mean()) * size / (size - 1)
    values = (
        values / values.std(correction=0).clamp_min(STD_FLOOR) if any(s >= SPREAD_FLOOR for s in spreads) else values
    )
    return Advantages(values, sum(spreads) / len(spreads), sum(s < SPREAD_FLOOR for s in spreads))


@dataclass(frozen=True)
class Surrogate:
    """The clipped policy loss and the values that are logged with it.

    Attributes:
        loss: scalar to minimise.
        ratio: [B], the probability of each action under the trained policy over that under the old one.
        clipfrac: share of the rows whose ratio is outside 1 - clip to 1 + clip.
        approx_kl: estimate of KL(old || new), >= 0.
    """

    loss: Tensor
    ratio: Tensor
    clipfrac: Tensor
    approx_kl: Tensor


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float) -> Surrogate:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), negated.

    Args:
        log_prob: [B] under the policy that is trained.
        old_log_prob: [B] under the policy that drew the actions.
        advantages: [B].
        clip: epsilon, the clipping range of the ratio, > 0.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return Surrogate(
        loss=-surrogate.mean(),
        ratio=ratio.detach(),
        clipfrac=((ratio - 1).abs() > clip).float().mean().detach(),
        approx_kl=(ratio - 1 - log_ratio).mean().detach(),  # the k3 estimator, which is never negative
    )
