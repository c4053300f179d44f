import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epd_ray.policy.loss import clipped_surrogate, leave_one_out

REWARDS, GROUPS = torch.tensor([1.0, 3.0, 10.0, 4.0]), ["a", "a", "b", "b"]
# Each reward minus its neighbour: -2, 2, 6, -6. Population std of these: sqrt((4 + 4 + 36 + 36) / 4) = sqrt(20).
BY_HAND = torch.tensor([-2.0, 2.0, 6.0, -6.0], dtype=torch.float64) / math.sqrt(20)


def test_two_groups_of_two_by_hand() -> None:
    advantages = leave_one_out(REWARDS, GROUPS)
    assert torch.allclose(advantages.values, BY_HAND, atol=1e-12)
    assert advantages.group_spread == pytest.approx((1 + 3) / 2)
    assert advantages.silent_groups == 0


def test_groups_of_two_and_three_by_hand() -> None:
    values = leave_one_out(torch.tensor([0.0, 1.0, 3.0, 3.0, 6.0]), list("babab")).values
    expected = torch.tensor([-4.5, -2.0, 0.0, 2.0, 4.5], dtype=torch.float64)  # 0 - (3 + 6) / 2, 1 - 3, ...
    assert torch.allclose(values, expected / math.sqrt((2 * 4 + 2 * 20.25) / 5), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(4)))
def test_values_follow_ids_under_a_shuffle(order: list[int]) -> None:
    shuffled = leave_one_out(REWARDS[order], [GROUPS[i] for i in order])
    assert torch.allclose(shuffled.values, BY_HAND[order], atol=1e-12)
    assert shuffled.group_spread == pytest.approx(2.0)


def test_population_std_is_one_and_groups_sum_to_zero() -> None:
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0))
    values = leave_one_out(rewards, [str(i % 6) for i in range(24)]).values
    assert values.std(correction=0).item() == pytest.approx(1.0, abs=1e-9)
    assert values.reshape(4, 6).sum(0).abs().max() < 1e-9


def test_silent_groups_get_zero() -> None:
    rewards = torch.tensor([0.5, 0.5 + 5e-7, 1.0, 2.0])
    advantages = leave_one_out(rewards, GROUPS)
    assert advantages.silent_groups == 1
    assert advantages.values[:2].tolist() == [0.0, 0.0] and advantages.values[3] > 1
    quiet = leave_one_out(torch.full((4,), 0.3), GROUPS)
    assert quiet.values.tolist() == [0.0] * 4 and quiet.silent_groups == 2


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group b has 1 rollout"):
        leave_one_out(torch.tensor([1.0, 2.0, 3.0]), ["a", "a", "b"])


def surrogate_inputs(ratios: list[float]) -> tuple[Tensor, Tensor]:
    old = torch.linspace(-1, 1, len(ratios), dtype=torch.float64)
    return old + torch.tensor(ratios, dtype=torch.float64).log(), old


def test_clipped_surrogate_by_hand() -> None:
    new, old = surrogate_inputs([1.5, 1.5, 0.5, 0.5, 1.1])
    new.requires_grad_()
    result = clipped_surrogate(new, old, torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]).double(), clip=0.2)
    # min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-0.5, -0.8), 2 * 1.1
    assert result.loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 5)
    assert result.clipfrac.item() == pytest.approx(4 / 5)
    kl = sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1)) / 5
    assert result.approx_kl.item() == pytest.approx(kl)
    assert result.ratio.tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5, 1.1])
    result.loss.backward()
    assert new.grad is not None
    # d loss / d log_prob = -ratio * advantage / B where the clip does not hold, 0 where it does
    assert new.grad.tolist() == pytest.approx([0.0, 1.5 / 5, -0.5 / 5, 0.0, -2.2 / 5])


def test_an_unchanged_policy_clips_nothing() -> None:
    new, old = surrogate_inputs([1.0] * 3)
    advantages = torch.tensor([1.0, -2.0, 0.4]).double()
    result = clipped_surrogate(new, old, advantages, clip=0.2)
    assert result.clipfrac == 0 and result.approx_kl == 0
    assert result.loss.item() == pytest.approx(-advantages.mean().item())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=8), st.floats(0.01, 0.5))
def test_bounds(pairs: list[tuple[float, float]], clip: float) -> None:
    new, old = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    result = clipped_surrogate(new, old, torch.ones(len(pairs)).double(), clip)
    assert result.approx_kl >= -1e-12
    assert 0 <= result.clipfrac <= 1
    assert result.loss >= -(1 + clip) - 1e-12  # a positive advantage gains no more than the clip allows
