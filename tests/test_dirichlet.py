import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core import Columns
from torch import Tensor
from torch.distributions import Dirichlet, LogNormal, kl_divergence

from epd_ray.backbones.simulated import SimulatedBackbone
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.errors import TableError
from epd_ray.policy.dirichlet import (
    LOG_STD_RANGE,
    SMALLEST_PART,
    TableDistribution,
    TableSpace,
    base_parameters,
    bound_concentration,
    clamp_scale_time,
)
from epd_ray.policy.network import PolicyNetwork, PolicySpec
from epd_ray.rdpo.module import SolverTableModule, TableActions
from epd_ray.solvers import SolverTable
from epd_ray.solvers.epd import check_options
from epd_ray.solvers.schedules import flow_shifted
from epd_ray.types import RolloutJob, RolloutRequest

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "golden_policy.json").read_text())
COLUMNS = ("positions", "weights", "scale_dir", "scale_time")
BASE = SolverTable(
    torch.tensor([[0.2, 0.7], [0.4, 0.6], [0.3, 0.9]]), torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.6, 0.4]])
)
SCALED = replace(BASE, scale_dir=torch.full((3, 2), 1.1), scale_time=torch.full((3, 2), 0.9))
SPACES = [TableSpace(2, scale_dir=d, scale_time=t) for d in (False, True) for t in (False, True)]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Any, tolerance: float = 1e-5) -> bool:
    return torch.allclose(actual.double(), tensor(expected), rtol=tolerance, atol=tolerance)


def table_of(columns: dict[str, Any]) -> SolverTable:
    return SolverTable(**{c: None if columns[c] is None else tensor(columns[c]) for c in COLUMNS})


def space_of(case: dict[str, Any]) -> TableSpace:
    base = case["base"]
    return TableSpace(case["points"], base["scale_dir"] is not None, base["scale_time"] is not None)


def reference_policy(case: dict[str, Any], residual: Any = 0.0) -> TableDistribution:
    """The golden policy: the reference's parameter of a scale is the mean of its logarithm, which starts at log o."""
    space, k = space_of(case), case["points"]
    base = base_parameters(table_of(case["base"]), space, case["concentration"]).double()
    parameters = base + tensor(residual)
    for first in range(space.segments + k, space.parameter_width, 2 * k):
        std = parameters[:, first + k : first + 2 * k].clamp(*LOG_STD_RANGE).exp()
        parameters[:, first : first + k] += std**2 / 2  # ours is the logarithm of the mean
    return TableDistribution(space, parameters)


def scaled_for(space: TableSpace) -> SolverTable:
    """SCALED with only the scales that the space draws."""
    return replace(
        SCALED,
        scale_dir=SCALED.scale_dir if space.scale_dir else None,
        scale_time=SCALED.scale_time if space.scale_time else None,
    )


def distribution(space: TableSpace, table: SolverTable | None = None, concentration: float = 20.0) -> TableDistribution:
    return TableDistribution(space, base_parameters(table or scaled_for(space), space, concentration))


@pytest.mark.parametrize("scale_dir", [False, True])
def test_a_start_point_stays(scale_dir: bool) -> None:
    base = SolverTable(torch.tensor([[0.0, 0.3, 0.9], [0.0, 0.2, 0.4]]), torch.tensor([[0.2, 0.3, 0.5]] * 2))
    space = TableSpace(3, scale_dir, start_point=True)
    policy = distribution(space, base)
    assert policy.parameters.shape == (2, space.parameter_width) == (2, 6 + 6 * scale_dir)
    assert torch.allclose(policy.mean_table().positions, base.positions, atol=1e-6)
    assert torch.allclose(policy.mean_table().weights, base.weights, atol=1e-6)
    actions = torch.from_numpy(np.stack([policy.draw(seed) for seed in range(64)]))
    table = space.table(actions)
    assert actions.shape == (64, 2, space.action_width) and table.start_point
    assert policy.log_prob(actions).isfinite().all() and table.positions[..., 1].std() > 0.01
    calm = bound_concentration(policy.parameters, space, 5.0)
    assert torch.allclose(calm[:, :3].exp().sum(-1), torch.tensor(5.0))
    assert torch.allclose(calm[:, 3:6].exp().sum(-1), torch.tensor(5.0))
    with pytest.raises(TableError, match="first points"):
        base_parameters(BASE, TableSpace(2, start_point=True), 20.0)


def test_a_lone_start_point_draws_its_scale_alone() -> None:
    one, space = torch.ones(2, 1), TableSpace(1, scale_dir=True, start_point=True)
    base = SolverTable(0 * one, one, scale_dir=torch.tensor([[0.5], [1.1]]))
    policy = distribution(space, base)
    actions = torch.from_numpy(np.stack([policy.draw(seed) for seed in range(64)]))
    table = space.table(actions)
    assert table.start_point and (table.weights == 1).all() and table.scale_dir is not None
    expected = policy.scales[0].log_prob(actions[..., -1:]).sum((-2, -1))
    assert torch.allclose(policy.log_prob(actions), expected) and table.scale_dir.std(0).min() > 0.01
    moved = TableDistribution(space, policy.parameters + 0.1)
    kl = torch.distributions.kl_divergence(policy.scales[0], moved.scales[0]).sum(-1)
    assert torch.allclose(policy.kl_per_interval(moved), kl, atol=1e-6)
    assert torch.allclose(policy.entropy_per_interval(), policy.scales[0].entropy().sum(-1), atol=1e-6)


def test_scales_are_not_dropped_in_silence() -> None:
    with pytest.raises(TableError, match="scales that would be lost"):
        base_parameters(SCALED, TableSpace(2), 10.0)


def spec(space: TableSpace, bound: float = 100.0) -> PolicySpec:
    base = distribution(space).parameters
    return PolicySpec(space, tuple(map(tuple, base.tolist())), max_concentration=bound, width=16, depth=2)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['intervals']}x{c['points']}")
def test_golden(case: dict[str, Any]) -> None:
    base, policy, sample = reference_policy(case), reference_policy(case, case["residual"]), case["sample"]
    assert base.parameters.shape == (case["intervals"], base.space.parameter_width)
    assert len(case["residual"]) == base.space.parameter_width
    assert close(base.segments.concentration, case["base_alpha_segments"])
    assert close(base.weights.concentration, case["base_alpha_weights"])
    assert close(policy.segments.concentration, case["alpha_segments"])
    assert close(policy.weights.concentration, case["alpha_weights"])
    parts = [sample[c] for c in ("segments", "weights", "scale_dir", "scale_time") if sample[c] is not None]
    action = torch.cat([tensor(p) for p in parts], dim=-1)
    assert action.shape == (case["intervals"], base.space.action_width)
    assert close(policy.space.table(action).positions, sample["positions"])
    assert close(policy.log_prob_per_interval(action), case["log_prob_per_interval"])
    assert close(policy.kl_per_interval(base), case["kl_to_base_per_interval"])
    assert close(policy.entropy_per_interval(), case["entropy_per_interval"])
    mean = policy.mean_table()
    for column in COLUMNS:
        actual, expected = getattr(mean, column), case["mean_table"][column]
        assert actual is None if expected is None else close(actual, expected), column


def test_golden_covers_spaces_with_and_without_scales() -> None:
    assert {space_of(c).scales for c in GOLDEN} == {0, 2}


@pytest.mark.parametrize("space", SPACES, ids=lambda s: f"dir={s.scale_dir}-time={s.scale_time}")
def test_widths_and_start(space: TableSpace) -> None:
    policy = distribution(space)
    assert policy.parameters.shape == (3, space.parameter_width) == (3, 5 + 4 * space.scales)
    assert policy.draw(0).shape == (3, space.action_width) == (3, 5 + 2 * space.scales)
    mean = policy.mean_table()
    assert torch.allclose(mean.positions, BASE.positions, atol=1e-6)
    assert torch.allclose(mean.weights, BASE.weights, atol=1e-6)
    for name, value in (("scale_dir", 1.1), ("scale_time", 0.9)):
        scale = getattr(mean, name)
        assert (scale is not None) == getattr(space, name)
        assert scale is None or torch.allclose(scale, torch.full((3, 2), value), rtol=1e-6)


@pytest.mark.parametrize("log_std", [-9.0, -3.0, -1.0, 0.5, 3.0])
def test_a_wider_scale_has_the_same_mean(log_std: float) -> None:
    space = TableSpace(2, scale_dir=True, scale_time=True)
    parameters = distribution(space).parameters.clone()
    for first in (7, 11):
        parameters[:, first : first + 2] = log_std
    policy = TableDistribution(space, parameters.double())
    assert all(torch.allclose(s.scale.log(), tensor(log_std).clamp(*LOG_STD_RANGE)) for s in policy.scales)
    for mean, table in zip(policy.scales, (SCALED.scale_dir, SCALED.scale_time), strict=True):
        assert table is not None
        assert torch.allclose(mean.mean, table.double(), rtol=1e-6)


def test_draw_is_a_function_of_the_seed_alone() -> None:
    policy = distribution(TableSpace(2, scale_time=True))
    torch.manual_seed(0)
    np.random.seed(0)
    first = policy.draw(7)
    torch.manual_seed(1)
    np.random.seed(1)
    assert first.dtype == np.float32 and np.array_equal(first, policy.draw(7))
    assert not np.array_equal(first, policy.draw(8))
    state = torch.get_rng_state()
    policy.draw(9)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_have_the_distributions_moments() -> None:
    policy = distribution(TableSpace(2, scale_dir=True, scale_time=True))
    draws = torch.from_numpy(np.stack([policy.draw(seed) for seed in range(1500)])).double()
    variance = torch.cat([policy.segments.variance, policy.weights.variance, *(s.variance for s in policy.scales)], -1)
    errors = (draws.mean(0) - policy.mean_action()) / (variance / len(draws)).sqrt()
    assert errors.abs().max() < 4.5
    assert torch.allclose(draws.var(0), variance.double(), rtol=0.25)


def test_sharp_corners_of_the_simplex_stay_inside() -> None:
    policy = TableDistribution(TableSpace(2), torch.full((1, 5), -6.0))  # alpha 0.0025: nearly all mass in the corners
    for seed in range(50):
        action = torch.from_numpy(policy.draw(seed))
        assert action.min() >= 0.9 * SMALLEST_PART
        assert torch.isfinite(policy.log_prob(action))
        assert policy.space.table(action).points == 2


@pytest.mark.parametrize("space", SPACES, ids=lambda s: f"dir={s.scale_dir}-time={s.scale_time}")
def test_log_prob_kl_and_entropy_against_torch(space: TableSpace) -> None:
    generator = torch.Generator().manual_seed(3)

    def parts() -> tuple[list[Tensor], list[Dirichlet], list[LogNormal]]:
        alphas = [5 * torch.rand(3, size, generator=generator).double() + 0.5 for size in (3, 2)]
        normals = [(torch.randn(3, 2, generator=generator).double(), torch.tensor(-1.5).double())] * space.scales
        columns = [*(a.log() for a in alphas)]
        for loc, log_std in normals:
            columns += [loc + (2 * log_std).exp() / 2, log_std.expand(3, 2)]
        return columns, [Dirichlet(a) for a in alphas], [LogNormal(loc, std.exp()) for loc, std in normals]

    (columns, simplices, normals), (others, other_simplices, other_normals) = parts(), parts()
    mine, theirs = (TableDistribution(space, torch.cat(c, dim=-1)) for c in (columns, others))
    pieces = [d.mean * 0.7 + 0.3 / d.mean.shape[-1] for d in simplices] + [n.mean * 1.1 for n in normals]
    expected = sum(d.log_prob(v) for d, v in zip(simplices, pieces, strict=False))
    expected = expected + sum(n.log_prob(v).sum(-1) for n, v in zip(normals, pieces[2:], strict=True))
    action = torch.cat(pieces, dim=-1)
    assert torch.allclose(mine.log_prob_per_interval(action), expected, atol=1e-9)
    assert torch.allclose(mine.log_prob(torch.stack([action, action])), expected.sum().expand(2), atol=1e-9)
    kl = sum(kl_divergence(p, q) for p, q in zip(simplices, other_simplices, strict=True))
    kl = kl + sum(kl_divergence(p, q).sum(-1) for p, q in zip(normals, other_normals, strict=True))
    assert torch.allclose(mine.kl_per_interval(theirs), kl, atol=1e-9) and float(kl.min()) > 0.01
    entropy = sum(d.entropy() for d in simplices) + sum(n.entropy().sum(-1) for n in normals)
    assert torch.allclose(mine.entropy_per_interval(), entropy, atol=1e-9)


def test_bound_concentration() -> None:
    space = TableSpace(2, scale_dir=True)
    wild = distribution(space, concentration=300.0)
    bounded = TableDistribution(space, bound_concentration(wild.parameters, space, 50.0))
    for part in ("segments", "weights"):
        assert torch.allclose(getattr(bounded, part).concentration.sum(-1), torch.tensor(50.0), rtol=1e-5)
        assert torch.allclose(getattr(bounded, part).mean, getattr(wild, part).mean, atol=1e-6)
    assert torch.equal(bounded.parameters[:, 5:], wild.parameters[:, 5:])
    calm = distribution(space, concentration=49.0).parameters
    assert torch.equal(bound_concentration(calm, space, 50.0), calm)
    mixed = torch.cat([wild.parameters[:, :3], calm[:, 3:]], dim=-1)
    assert torch.equal(bound_concentration(mixed, space, 50.0)[:, 3:], calm[:, 3:])  # each simplex has its own bound


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (SolverTable(BASE.positions[None], BASE.weights[None]), r"shape \(1, 3, 2\), expected \[N, 2\]"),
        (SolverTable(torch.tensor([[0.5]]), torch.ones(1, 1)), r"shape \(1, 1\)"),
        (SolverTable(torch.tensor([[0.2, 0.6], [0.5, 0.5]]), BASE.weights[:2]), r"segment\[1\]\[1\] is 0"),
        (SolverTable(torch.tensor([[0.0, 0.6]]), BASE.weights[:1]), r"segment\[0\]\[0\] is 0, at least 0.001"),
        (SolverTable(BASE.positions[:1], torch.tensor([[1.0, 0.0]])), r"weight\[0\]\[1\] is 0"),
    ],
)
def test_base_parameters_refuses(table: SolverTable, message: str) -> None:
    with pytest.raises(TableError, match=message):
        base_parameters(table, TableSpace(2), 10.0)


@pytest.mark.parametrize("space", SPACES, ids=lambda s: f"dir={s.scale_dir}-time={s.scale_time}")
def test_policy_starts_at_the_base(space: TableSpace) -> None:
    base = distribution(space).parameters
    state = torch.get_rng_state()
    network = PolicyNetwork(spec(space))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(network.parameters_array(), base.numpy())
    module = SolverTableModule(model_config={"policy": spec(space)})
    out = module.forward_train({Columns.OBS: torch.zeros(4, 1)})[Columns.ACTION_DIST_INPUTS]
    assert torch.equal(out, base.expand(4, -1, -1))
    bounded = PolicyNetwork(spec(space, bound=5.0)).parameters_array()
    assert np.exp(bounded[:, :3]).sum(-1).tolist() == pytest.approx([5.0] * 3, rel=1e-5)
    network.out.bias.data += 0.1
    assert not np.array_equal(network.parameters_array(), base.numpy())


@pytest.mark.parametrize("space", SPACES, ids=lambda s: f"dir={s.scale_dir}-time={s.scale_time}")
def test_the_first_step_stays_where_tables_are_drawn(space: TableSpace) -> None:
    network = PolicyNetwork(replace(spec(space), width=128))
    before = TableDistribution(space, network().detach())
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    network()[0].sum().backward()
    optimizer.step()
    after = TableDistribution(space, network().detach())
    assert float((after.segments.concentration / before.segments.concentration)[0].log().abs().min()) > 0.1
    for old, new in zip(before.scales, after.scales, strict=True):
        moved = ((new.loc - old.loc) / old.scale)[0].abs()  # in standard deviations
        assert float(moved.min()) > 0.1 and float(moved.max()) < 1


def test_rllibs_view_is_the_same_distribution() -> None:
    space = TableSpace(2, scale_dir=True)
    policy = distribution(space)
    parameters = policy.parameters.expand(2, -1, -1)
    view = SolverTableModule(model_config={"policy": spec(space)}).action_dist_cls.from_logits(parameters)
    assert isinstance(view, TableActions)
    actions = torch.from_numpy(np.stack([policy.draw(0), policy.draw(1)]))
    assert torch.equal(view.logp(actions), policy.log_prob(actions)) and view.logp(actions).shape == (2,)
    assert torch.allclose(view.entropy(), policy.entropy_per_interval().sum().expand(2))
    other = TableActions(parameters - 0.2, space)
    assert torch.allclose(
        view.kl(other), policy.kl_per_interval(TableDistribution(space, policy.parameters - 0.2)).sum()
    )
    assert view.sample().shape == (2, 3, space.action_width)


def scaled_draws(positions: list[list[float]], count: int) -> tuple[TableSpace, Tensor, Tensor]:
    """Parameters [N, W] and draws [count, N, A] of tables whose first points lie near sigma = 1."""
    space = TableSpace(2, scale_time=True)
    parameters = base_parameters(SolverTable(tensor(positions), BASE.weights[: len(positions)].double()), space, 20.0)
    policy = TableDistribution(space, parameters)
    return space, parameters, torch.from_numpy(np.stack([policy.draw(seed) for seed in range(count)]))


def test_time_scales_stay_on_a_flow_models_schedule() -> None:
    space, _, draws = scaled_draws([[0.02, 0.7], [0.4, 0.6]], 40)
    sigmas, table = flow_shifted(3), space.table(draws)
    with pytest.raises(TableError, match=r"scale_time.*at most 1"):
        check_options(table, sigmas, afs=False, order=1, form="flow")
    clamped = clamp_scale_time(table, sigmas, "flow")
    check_options(clamped, sigmas, afs=False, order=1, form="flow")
    assert table.scale_time is not None and clamped.scale_time is not None
    grid = sigmas[:, None]
    inner = grid[1:] ** table.positions * grid[:-1] ** (1 - table.positions)
    fits = table.scale_time * inner <= 1
    assert torch.equal(clamped.scale_time[fits], table.scale_time[fits]) and not bool(fits.all())
    assert torch.allclose((clamped.scale_time * inner)[~fits], torch.ones(1, dtype=torch.float64), atol=1e-6)
    assert torch.equal(clamped.positions, table.positions) and torch.equal(clamped.weights, table.weights)
    assert clamp_scale_time(table, sigmas, "ve") is table
    plain = replace(table, scale_time=None)
    assert clamp_scale_time(plain, sigmas, "flow") is plain


def test_rollouts_survive_time_scales_above_one() -> None:
    space, parameters, draws = scaled_draws([[0.02, 0.7], [0.4, 0.6]], 8)
    worker = RolloutWorker(SimulatedBackbone(), 1.0, space, Sampler("epd", 2, "epd", "EPD"))
    requests = tuple(RolloutRequest(f"r{i}", "g", "a red circle", 5, i) for i in range(8))
    job = RolloutJob((0, 0), 0, parameters.numpy(), requests)
    generated = worker.generate(job)
    assert generated.images.shape == (8, 3, 8, 8) and len(np.unique(generated.images, axis=0)) == 8
    assert np.array_equal(generated.images, worker.generate(job).images)
    exact = TableDistribution(space, parameters.double())
    for rollout, draw in zip(generated.rollouts, draws, strict=True):
        assert np.array_equal(rollout.action, draw.numpy())  # what was drawn, not what was clamped
        assert rollout.log_prob == pytest.approx(float(exact.log_prob(draw.double())), abs=1e-5)
