"""Stage 1 by least squares: the small problem exactly, shards, and the table against what it replaces."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from epd_ray.backbones.gaussian import GaussianBackbone
from epd_ray.drawing.sampler import Sampler, baseline
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.errors import ConfigError
from epd_ray.policy.dirichlet import TableDistribution, TableSpace, base_parameters
from epd_ray.solvers import SolverTable
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.solvers.costs import Cost
from epd_ray.solvers.epd import analytic_drift, epd, multistep
from epd_ray.solvers.table import dpm2_table
from epd_ray.stage_one.combinations import MAX_COMBINATIONS
from epd_ray.stage_one.fit import StageOne, fit_table
from epd_ray.stage_one.least_squares import (
    best_points,
    normal_equations,
    position_grid,
    scaled_least_squares,
    simplex_least_squares,
)
from epd_ray.stage_one.shard import Points, Shard, ShardStates, as_table, table_of
from epd_ray.stage_one.teacher import refine

PROMPTS = tuple(f"prompt {i}" for i in range(8))
SEEDS = tuple(range(8))
STAGE = StageOne(3, 2, PROMPTS, SEEDS, shard_size=8, teacher_steps=4, grid=7, min_weight=0.05)
TWO = (Points((0.2, 0.7), (0.5, 0.5)), Points((0.3, 0.6), (0.4, 0.6)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_simplex_least_squares_is_optimal(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        directions, target = rng.normal(size=(size, 30)), rng.normal(size=30)
        gram, cross = directions @ directions.T, directions @ target
        ours = simplex_least_squares(gram, cross, 0.05)
        assert ours.min() >= 0.05 - 1e-9 and abs(ours.sum() - 1) < 1e-12

        def loss(w, gram=gram, cross=cross):
            return w @ gram @ w - 2 * w @ cross

        reference = minimize(
            loss, np.full(size, 1 / size), method="SLSQP", bounds=[(0.05, 1)] * size,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-12},
        )  # fmt: skip
        assert loss(ours) <= reference.fun + 1e-6 * abs(reference.fun)


@pytest.mark.parametrize("size", [2, 3])
def test_scaled_least_squares_is_optimal(size):
    """Against o w as the unknown, whose sum is o and whose floor is a share of it."""
    rng, inside = np.random.default_rng(size), 0
    for _ in range(20):
        directions = rng.normal(size=(size, 30)) + 0.5
        target = rng.uniform(0.3, 1.8) * directions.mean(0) + 0.3 * rng.normal(size=30)
        gram, cross = directions @ directions.T, directions @ target
        weights, scale = scaled_least_squares(gram, cross, 0.05, 0.5)
        assert weights.min() >= 0.05 - 1e-9 and abs(weights.sum() - 1) < 1e-12 and 0.5 <= scale <= 1.5

        def loss(v, gram=gram, cross=cross):
            return v @ gram @ v - 2 * v @ cross

        limits = [{"type": "ineq", "fun": lambda v: v - 0.05 * v.sum()}]
        limits += [{"type": "ineq", "fun": lambda v, s=s: s * (v.sum() - (1 - s * 0.5))} for s in (1, -1)]
        reference = minimize(loss, np.full(size, 1 / size), method="SLSQP", constraints=limits, options={"ftol": 1e-12})
        assert loss(scale * weights) <= reference.fun + 1e-4 * float(target @ target)
        inside += 0.51 < scale < 1.49
    assert 5 < inside < 20  # both kinds were met


def worker(backbone):
    return RolloutWorker(backbone, 1.0, None, None)


def on(*workers):
    """Runs tasks on workers in turn."""
    return lambda method, calls: [getattr(workers[i % len(workers)], method)(*c) for i, c in enumerate(calls)]


def distil(backbone, stage=STAGE):
    return as_table(fit_table(on(worker(backbone)), stage, backbone.sigmas(stage.intervals).tolist()))


def test_equations_are_those_of_all_drifts_at_once():
    backbone, grid = GaussianBackbone(components=2), position_grid(5)
    interval = ShardStates(backbone, 1.0).interval(Shard(PROMPTS, SEEDS, 3, TWO[:1], 4))
    (a, b), x = interval.sigmas.tolist(), interval.x
    d = interval.drift(x, torch.full((8,), a))
    inner = [b**r * a ** (1 - r) for r in grid]
    drifts = torch.stack([interval.drift(x + (s - a) * d, torch.full((8,), s)) for s in inner]).flatten(1).double()
    wanted = ((interval.target - x) / (b - a)).flatten().double()
    found = normal_equations(interval, grid)
    np.testing.assert_allclose(found.gram, drifts @ drifts.T, rtol=1e-6)
    np.testing.assert_allclose(found.cross, drifts @ wanted, rtol=1e-5)
    assert found.target == pytest.approx(float(wanted @ wanted), rel=1e-6)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 2, 5), (1,) * 8])
def test_shards_add_up_to_the_whole(sizes):
    backbone = GaussianBackbone(components=2)
    whole, *parts = [
        worker(backbone).distill(Shard(PROMPTS[i:j], SEEDS[i:j], 3, TWO, 4), position_grid(7))
        for i, j in [(0, 8), *zip(np.cumsum((0, *sizes)).tolist(), np.cumsum(sizes).tolist(), strict=False)]
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    np.testing.assert_allclose(total.gram, whole.gram, rtol=1e-6)
    np.testing.assert_allclose(total.cross, whole.cross, rtol=1e-6)
    assert total.target == pytest.approx(whole.target, rel=1e-6)


def test_number_of_workers_changes_no_bit():
    backbone = GaussianBackbone(components=2)
    stage = StageOne(3, 2, PROMPTS, SEEDS, shard_size=3, teacher_steps=4, grid=7, min_weight=0.05)
    sigmas = backbone.sigmas(3).tolist()
    one, three = (fit_table(on(*(worker(backbone) for _ in range(n))), stage, sigmas) for n in (1, 3))
    assert one == three


def test_table_is_nearer_the_teacher_than_the_baselines():
    backbone = GaussianBackbone(components=2)
    conditioning, noise = backbone.encode(PROMPTS, 1.0), noises(backbone, SEEDS)
    sigmas = backbone.sigmas(3)
    fine = Sampler("dpm2", 24, "fine", "fine", sigmas=tuple(refine(sigmas, 8).tolist()))
    teacher = fine.run(backbone, conditioning, noise)

    def distance(sampler):
        return float((sampler.run(backbone, conditioning, noise) - teacher).square().mean())

    learned = distance(Sampler("epd", 3, "t", "t", distil(backbone)))
    assert learned < 0.5 * min(distance(baseline(kind, 6)) for kind in ("heun", "dpm2"))


@pytest.mark.parametrize(("afs", "order"), [(True, 1), (False, 2), (True, 3)])
def test_residual_is_that_of_the_solver_that_is_deployed(afs, order):
    """With the analytical first step and multistep slopes too."""
    backbone = GaussianBackbone(components=2)
    stage = StageOne(3, 2, PROMPTS, SEEDS, 8, teacher_steps=4, grid=7, min_weight=0.05, afs=afs, order=order)
    fits = fit_table(on(worker(backbone)), stage, backbone.sigmas(3).tolist())
    conditioning, sigmas = backbone.encode(PROMPTS, 1.0), backbone.sigmas(3)
    start, states = backbone.initial(noises(backbone, SEEDS)), []
    for s, table, options in (
        (refine(sigmas, 4), dpm2_table(12), {}),
        (sigmas, as_table(fits), {"afs": afs, "order": order, "form": "flow"}),
    ):
        states.append([start])
        keep = states[-1].append
        epd(lambda x, t: backbone.drift(x, t, conditioning.repeat(len(x) // 8)), start, s, table,
            callback=lambda _, sigma, x, keep=keep: keep(x), **options)  # fmt: skip
    teacher, student = states[0][::4], states[1]
    for i, fit in enumerate(fits):
        left = float((student[i + 1] - teacher[i + 1]).square().sum() / (teacher[i + 1] - student[i]).square().sum())
        assert fit.residual == pytest.approx(left, rel=1e-3, abs=1e-7)


def test_states_are_remade_when_lost(monkeypatch):
    backbone = GaussianBackbone(components=2)
    shards = [Shard(PROMPTS[i : i + 4], SEEDS[i : i + 4], 3, TWO, 4) for i in (0, 4)]
    warm, grid = worker(backbone), position_grid(7)
    first = [warm.distill(s, grid) for s in shards]
    assert len(warm.states._kept) == 4
    monkeypatch.setattr("epd_ray.stage_one.shard.KEPT_BYTES", 0)
    short = worker(backbone)
    for shard, before in zip([*shards, *shards], first * 2, strict=True):
        for again in (warm.distill(shard, grid), short.distill(shard, grid)):
            np.testing.assert_array_equal(again.gram, before.gram)
            np.testing.assert_array_equal(again.cross, before.cross)
    assert len(short.states._kept) == 1


def counting(calls):
    """A backbone that notes the rows of each call of its drift."""

    class Counting(GaussianBackbone):
        def drift(self, x, sigma, conditioning):
            calls.append(len(x))
            return super().drift(x, sigma, conditioning)

    return Counting()


def test_states_are_made_once():
    calls = []
    counted, grid = worker(counting(calls)), position_grid(7)
    shards = [Shard(PROMPTS[i : i + 4], SEEDS[i : i + 4], 3, TWO[:1], 4) for i in (0, 4)]
    for shard in shards:
        counted.distill(shard, grid)
    assert len(calls) == 2 * (2 * 12 + 3 + 7)  # the teacher, one interval of the student and the next slope, the grid
    assert max(calls) == 8  # the student's K points are one call; nothing else has more rows than prompts
    for shard in shards:
        counted.distill(shard, grid)
    assert len(calls) == 2 * (2 * 12 + 3 + 7) + 2 * 7


MANY = tuple(Points((0.1 + 0.02 * i, 0.6 + 0.03 * i), (0.3 + 0.04 * i, 0.7 - 0.04 * i)) for i in range(9))
FROM_THE_START = tuple(replace(p, positions=(0.0, p.positions[1]), scale_dir=(0.9, 0.9)) for p in MANY)


def replayed(backbone, shard):
    """Where the deployed solver is after the fitted intervals, all of them from the start, and its slope there."""
    drift = ConditionedDrift(backbone, backbone.encode(shard.prompts, 1.0))
    sigmas, states = backbone.sigmas(shard.intervals), [backbone.initial(noises(backbone, shard.noise_seeds))]
    if shard.fitted:
        epd(drift, states[0], sigmas[: len(shard.fitted) + 1], table_of(shard.fitted), afs=shard.afs, order=shard.order,
            form=backbone.form, callback=lambda _, sigma, x: states.append(x))  # fmt: skip
    starts = zip(states, sigmas.float(), strict=False)
    drifts = [drift(x, sigma.expand(len(x))) for x, sigma in starts]
    if shard.afs:
        drifts[0] = analytic_drift(states[0], float(sigmas[0]), backbone.form)
    return states[-1], multistep(drifts[::-1][: shard.order])


@pytest.mark.parametrize("points", [MANY, FROM_THE_START], ids=["inside", "start point"])
@pytest.mark.parametrize(("afs", "order"), [(False, 1), (True, 1), (False, 2), (True, 2), (False, 4), (True, 4)])
@pytest.mark.parametrize("kept_bytes", [1 << 30, 0], ids=["kept", "dropped"])
def test_a_state_goes_on_from_the_kept_one_to_the_bit(monkeypatch, points, afs, order, kept_bytes):
    """Also when it was dropped, and when two other workers had the intervals in turn."""
    monkeypatch.setattr("epd_ray.stage_one.shard.KEPT_BYTES", kept_bytes)
    backbone = GaussianBackbone(components=2)
    workers = [ShardStates(backbone, 1.0) for _ in range(3)]
    for i in range(len(points) + 1):
        shard = Shard(PROMPTS[:3], SEEDS[:3], 10, points[:i], 2, afs, order)
        x, slope = replayed(backbone, shard)
        for states in (workers[0], workers[1 + i % 2]):
            for _ in range(2):
                found = states.interval(shard)
                assert torch.equal(found.x, x) and torch.equal(found.slope, slope)


@pytest.mark.parametrize("order", [1, 3])
def test_drift_calls_grow_in_proportion_to_the_intervals(order):
    counts = []
    for intervals in (4, 8, 16):
        calls = []
        own = on(worker(counting(calls)))
        stage = replace(STAGE, intervals=intervals, teacher_steps=1, grid=5, order=order)
        fit_table(own, stage, [0.0] * (intervals + 1))
        counts.append(len(calls))
    # An interval: two of the teacher, the grid, the slope; and the student's points in all but the last.
    assert counts == [n * (2 + 5 + 1) + n - 1 for n in (4, 8, 16)]


def test_one_place_is_kept_for_each_shard():
    states = ShardStates(GaussianBackbone(components=2), 1.0)
    for i in range(len(MANY) + 1):
        states.interval(Shard(PROMPTS[:3], SEEDS[:3], 10, MANY[:i], 2, order=2))
    assert sorted(map(len, states._kept.values())) == [3, 10]  # the state and two drifts; the teacher's


def test_each_interval_is_told_of():
    backbone, seen = GaussianBackbone(components=2), []
    fits = fit_table(on(worker(backbone)), STAGE, backbone.sigmas(3).tolist(), after_each=seen.append)
    assert seen == fits and len(seen) == 3


def test_too_many_combinations_are_refused_before_anything_is_fitted():
    said = (
        r"grid is 41: least squares would fit 22,481,940 combinations of 7 positions per interval, at most 200,000 are "
        r"possible \(set distill.grid to 22 or less, or lower solver.points\)"
    )
    with pytest.raises(ConfigError, match=said):
        replace(STAGE, points=8, grid=41, start_point=True)
    most = replace(STAGE, points=8, grid=22, start_point=True)
    assert comb(most.grid, 7) <= MAX_COMBINATIONS < comb(23, 7)
    assert replace(STAGE, points=64, grid=64).points == 64


def test_fit_keeps_the_weights_that_a_dirichlet_can_draw():
    backbone = GaussianBackbone(components=2)
    equations = worker(backbone).distill(Shard(PROMPTS, SEEDS, 3, (), 4), position_grid(7))
    fit = best_points(equations, position_grid(7), 2, 0.3)
    assert min(fit.points.weights) >= 0.3 - 1e-9 and abs(sum(fit.points.weights) - 1) < 1e-9


def test_refined_schedule_keeps_its_ends():
    fine = refine(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), 4)
    assert len(fine) == 9 and fine[0] == 1.0 and fine[4] == 0.5 and fine[-1] == 0.1


def test_a_start_point_is_found_for_nothing():
    """K = 3 with one at the start evaluates as often as K = 2 without, and follows the teacher better."""
    backbone = GaussianBackbone(components=2)
    sigmas = backbone.sigmas(3).tolist()
    plain, free = (
        fit_table(on(worker(backbone)), replace(STAGE, points=2 + start, start_point=start), sigmas)
        for start in (False, True)
    )
    tables = as_table(plain), as_table(free)
    assert tables[1].start_point and tables[0].cost() == tables[1].cost() == Cost(6, 9)
    assert sum(fit.residual for fit in free) < 0.7 * sum(fit.residual for fit in plain)


def test_a_lone_start_point_gets_its_best_scale_from_one_evaluation():
    backbone = GaussianBackbone(components=2)
    stage = replace(STAGE, points=1, start_point=True, scale_range=0.7)
    grids = []

    def work(method, tasks):
        grids.extend(grid for _, grid in tasks)
        return on(worker(backbone))(method, tasks)

    (first, *_) = fit_table(work, stage, backbone.sigmas(3).tolist())
    assert set(grids) == {(0.0,)} and first.points.positions == (0.0,) and first.points.weights == (1.0,)
    equations = worker(backbone).distill(stage.shards([])[0], (0.0,))
    best = float(equations.cross[0] / equations.gram[0, 0])
    assert abs(first.points.scale_dir[0] - best) < 0.05 and first.points.scale_dir[0] != 1


def test_direction_scales_follow_the_teacher_better():
    backbone = GaussianBackbone(components=2)
    sigmas = backbone.sigmas(3).tolist()
    plain, scaled = (fit_table(on(worker(backbone)), replace(STAGE, scale_range=r), sigmas) for r in (0.0, 0.5))
    assert as_table(plain).scale_dir is None and as_table(scaled).scale_time is None
    assert scaled[0].residual < 0.9 * plain[0].residual  # the later ones start from other states
    for fit in scaled:
        assert fit.points.scale_dir is not None and len(set(fit.points.scale_dir)) == 1
        assert 0.5 <= fit.points.scale_dir[0] <= 1.5
    parameters = base_parameters(as_table(scaled), TableSpace(2, scale_dir=True), 30.0)
    mean = TableDistribution(TableSpace(2, scale_dir=True), parameters).mean_table()
    assert torch.allclose(mean.scale_dir, as_table(scaled).scale_dir.float(), rtol=2e-3)


@pytest.mark.parametrize(("start_point", "margin"), [(False, 0.02), (True, 0.003)])
def test_what_the_grid_offers_can_be_drawn(start_point, margin):
    grid = position_grid(11, start_point)
    assert (grid[0] == 0) == start_point and len(grid) == 11 + start_point
    assert grid[start_point] == margin and grid[-1] == 1 - margin
    table = SolverTable(torch.tensor([[grid[0], grid[-1]]]), torch.tensor([[0.5, 0.5]]))
    base_parameters(table, TableSpace(2, start_point=start_point), 30.0)
