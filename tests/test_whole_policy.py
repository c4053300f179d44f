"""The distribution over tables that also set their grid, history and guidance."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Dirichlet, LogNormal, Normal, kl_divergence

from epd_ray.errors import TableError
from epd_ray.policy.dirichlet import TableDistribution, TableSpace, base_parameters, bound_concentration
from epd_ray.solvers import SolverTable

N = 4
SHARES = torch.tensor([0.4, 0.1, 0.3, 0.2])
HISTORY = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.6, -0.1], [0.4, 0.2]])
SCALES = torch.tensor([5.0, 3.0, 2.0, 1.5])
REUSE = (False, False, True, False)
TABLE = SolverTable(
    torch.zeros(N, 1), torch.ones(N, 1), scale_dir=torch.tensor([[1.1], [0.9], [1.0], [1.2]]), grid=SHARES,
    history=HISTORY, guidance=SCALES, reuse=torch.tensor(REUSE),
)  # fmt: skip
SPACE = TableSpace(1, scale_dir=True, start_point=True, grid=True, history=2, guidance=True, reuse=REUSE)
WIDTH = 1 + 1 + 2 + 1 + 4 + 2


def policy(concentration: float = 20.0) -> TableDistribution:
    return TableDistribution(SPACE, base_parameters(TABLE, SPACE, concentration))


def test_the_policy_starts_as_the_table() -> None:
    start = policy()
    assert start.parameters.shape == (N, WIDTH) == (N, SPACE.parameter_width)
    assert start.mean_action().shape == (N, SPACE.action_width) == (N, 1 + 1 + 1 + 1 + 2 + 1)
    mean = start.mean_table()
    for name, values in (TABLE.columns() | TABLE.interval_columns()).items():
        torch.testing.assert_close(getattr(mean, name), values, rtol=1e-5, atol=1e-6)
    assert mean.reused == [2] and SPACE.residual_units.shape == (WIDTH,)


def test_what_a_table_leaves_out_starts_as_if_it_were_not_there() -> None:
    plain = SolverTable(torch.zeros(N, 1), torch.ones(N, 1))
    space = TableSpace(1, start_point=True, grid=True, history=1, guidance=True)
    mean = TableDistribution(space, base_parameters(plain, space, 20.0, guidance_scale=4.5)).mean_table()
    assert mean.grid is not None and mean.history is not None and mean.guidance is not None
    assert mean.grid.tolist() == pytest.approx([0.25] * N) and not mean.history.any()
    assert mean.guidance.tolist() == pytest.approx([4.5] * N)


def test_the_density_is_that_of_its_parts() -> None:
    mine, std = policy(), math.exp(-3.0)
    action = torch.from_numpy(mine.draw(3))
    direction, grid, history, guidance = action[:, 2], action[:, 3], action[:, 4:6], action[:, 6]
    expected = Dirichlet(20.0 * N * SHARES).log_prob(grid / grid.sum())
    expected = expected + Normal(HISTORY, std).log_prob(history).sum()
    assert TABLE.scale_dir is not None
    for value, mean in ((direction, TABLE.scale_dir[:, 0]), (guidance, SCALES)):
        expected = expected + LogNormal(mean.log() - std**2 / 2, std).log_prob(value).sum()
    assert float(mine.log_prob(action)) == pytest.approx(float(expected), abs=1e-3)
    apart = kl_divergence(Dirichlet(20.0 * N * SHARES), Dirichlet(35.0 * N * SHARES))
    assert float(mine.kl_per_interval(policy(35.0)).sum()) == pytest.approx(float(apart), abs=1e-3)
    assert mine.grid is not None and mine.history is not None and mine.guidance is not None
    entropy = mine.grid.entropy() + sum(p.entropy().sum() for p in (mine.history, mine.guidance, *mine.scales))
    assert float(mine.entropy_per_interval().sum()) == pytest.approx(float(entropy), abs=1e-3)


def test_draws_are_tables_around_the_start() -> None:
    drawn = [SPACE.table(torch.from_numpy(policy(100.0).draw(seed))) for seed in range(200)]
    for name in ("grid", "history", "guidance"):
        values = torch.stack([getattr(table, name) for table in drawn])
        torch.testing.assert_close(values.mean(0), getattr(TABLE, name), rtol=0.05, atol=0.02)
        changed = values.std(0) > 0
        assert torch.equal(changed, HISTORY != 0) if name == "history" else changed.all()
    assert all(table.reused == [2] for table in drawn)


def test_a_space_without_these_parts_draws_what_it_drew() -> None:
    bare = SolverTable(torch.zeros(N, 1), torch.ones(N, 1), scale_dir=TABLE.scale_dir)
    small = TableSpace(1, scale_dir=True, start_point=True)
    before = TableDistribution(small, base_parameters(bare, small, 20.0)).draw(5)
    assert np.array_equal(policy().draw(5)[:, :3], before)


def test_the_grids_concentration_is_bounded_for_each_interval() -> None:
    bounded = TableDistribution(SPACE, bound_concentration(policy(100.0).parameters, SPACE, 50.0))
    assert bounded.grid is not None
    assert float(bounded.grid.concentration.sum()) == pytest.approx(50.0 * N, rel=1e-5)
    torch.testing.assert_close(bounded.grid.mean, SHARES)
    torch.testing.assert_close(bounded.parameters[:, 5:], policy().parameters[:, 5:])


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (TableSpace(1, True, start_point=True, history=2, guidance=True, reuse=REUSE), "has grid, which would be lost"),
        (TableSpace(1, True, start_point=True, grid=True, history=1, guidance=True, reuse=REUSE), "weighs 2 earlier"),
        (TableSpace(1, True, start_point=True, grid=True, history=2, guidance=True), r"reuses in the intervals \[2\]"),
    ],
)
def test_parts_that_are_not_drawn_are_not_lost(space: TableSpace, says: str) -> None:
    with pytest.raises(TableError, match=says):
        base_parameters(TABLE, space, 20.0)


def test_guidance_needs_a_scale_to_start_from() -> None:
    plain = SolverTable(torch.zeros(N, 1), torch.ones(N, 1))
    with pytest.raises(TableError, match="neither the start table nor the run"):
        base_parameters(plain, TableSpace(1, start_point=True, guidance=True), 20.0)
