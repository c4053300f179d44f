"""Stage 1 by back-propagation: the gradient itself, known optima, and what must change no number."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from epd_ray.backbones.gaussian import GaussianBackbone
from epd_ray.config.loading import load_config
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.errors import ConfigError, ModelError
from epd_ray.policy.dirichlet import TableSpace, base_parameters
from epd_ray.runs.stage_one import descent_of, stage_one
from epd_ray.solvers.epd import epd
from epd_ray.stage_one.fit import StageOne, fit_table, losses
from epd_ray.stage_one.gradient import (
    Descent,
    descend,
    distill_loss,
    drawable,
    point_columns,
    raw_parameters,
)
from epd_ray.stage_one.shard import Points, Shard, ShardStates, as_table, table_of
from tests import families
from tests.test_distill import PROMPTS, SEEDS, on

FIRST = (Points((0.2, 0.7), (0.45, 0.55), (1.1, 0.9), (0.95, 1.05)),)
PLAIN = Points((0.3, 0.8), (0.6, 0.4))
SCALED = Points((0.3, 0.8), (0.6, 0.4), (1.05, 0.9), (0.9, 1.1))
OPTIONS = Descent(steps=30, lr=0.2, batch=1, min_weight=0.05)


def exact_interval(prompts=4, fitted=FIRST, **shard):
    """One interval of a Gaussian mixture in float64."""
    states = ShardStates(GaussianBackbone(components=3), 2.0)
    found = states.interval(Shard(PROMPTS[:prompts], SEEDS[:prompts], 3, fitted, 4, **shard))
    return replace(found, x=found.x.double(), slope=found.slope.double(), target=found.target.double())


@pytest.mark.parametrize("points", [PLAIN, SCALED, Points((0.8, 0.3), (0.6, 0.4))], ids=["plain", "scales", "unsorted"])
@pytest.mark.parametrize("order", [1, 3])
def test_gradient_is_that_of_finite_differences(points, order):
    interval = exact_interval(order=order)
    found = distill_loss(interval, points, True).gradient
    columns = np.array([c[0].tolist() for c in points.columns().values()])
    assert found.shape == columns.shape
    h = 1e-6
    for row, k in np.ndindex(*columns.shape):
        if row == 1 and k:
            continue  # the weights sum to 1, so only their differences can be tried
        there = []
        for sign in (1, -1):
            moved = columns.copy()
            moved[row, k] += sign * h
            moved[row, k + 1 :] -= sign * h * (row == 1)
            there.append(distill_loss(interval, Points(*map(tuple, moved)), False).distance)
        expected = found[row, k] - found[row, k + 1] if row == 1 else found[row, k]
        assert (there[0] - there[1]) / (2 * h) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_distance_is_that_of_the_deployed_step():
    interval = exact_interval()
    sigma = interval.sigmas[0].expand(len(interval.x))
    interval = replace(interval, slope=interval.drift(interval.x, sigma))  # all of it in float64
    d = distill_loss(interval, SCALED, False)
    rows = interval.drift  # repeats the conditioning where K points come as B * K rows
    end = epd(rows, interval.x, interval.sigmas, table_of([SCALED]))
    assert d.distance == pytest.approx(float((end - interval.target).square().sum()), rel=1e-10)
    assert d.step == pytest.approx(float((interval.x - interval.target).square().sum()), rel=1e-10)
    assert d.size == interval.x.numel()


def test_checkpointing_changes_no_number():
    interval = exact_interval()
    with_it, without = (distill_loss(interval, SCALED, True, checkpointed) for checkpointed in (True, False))
    assert with_it.distance == without.distance
    np.testing.assert_array_equal(with_it.gradient, without.gradient)


def test_a_point_is_kept_in_memory_at_a_time():
    """Checkpointed, the graph holds no activation until the way back; each call has B rows, run twice."""
    calls = []
    interval = exact_interval()

    def drift(x, sigma):
        calls.append((len(x), torch.is_grad_enabled()))
        return interval.drift(x, sigma)

    distill_loss(replace(interval, drift=drift), PLAIN, True)
    assert [rows for rows, _ in calls] == [4] * 4
    calls.clear()
    distill_loss(replace(interval, drift=drift), PLAIN, False)
    assert calls == [(4, False)] * 2


def on_one_interval(interval):
    return lambda points, shards, gradient: [distill_loss(interval, points, gradient) for _ in shards]


@pytest.mark.parametrize("scales", [False, True])
def test_finds_the_points_that_made_the_target(scales):
    """The target is a step of these very points, so the best residual is 0."""
    interval = exact_interval()
    made_by = SCALED if scales else PLAIN
    target = epd(interval.drift, interval.x, interval.sigmas, table_of([made_by]))
    ends = tuple(interval.sigmas.tolist())
    options = replace(OPTIONS, steps=250, scale_range=0.3 if scales else 0.0, scale_time=scales)
    start = Points((1 / 3, 2 / 3), (0.5, 0.5))
    problem = on_one_interval(replace(interval, target=target))
    before = problem(start, [0], False)[0].residual
    found = descend(problem, 1, ends, start, options)
    assert found.residual < (5e-3 if scales else 1e-4) * before
    if not scales:  # with scales several tables make the same step
        assert found.points.positions == pytest.approx(PLAIN.positions, abs=0.02)
        assert found.points.weights == pytest.approx(PLAIN.weights, abs=0.02)


def test_scales_train_and_stay_in_their_range():
    interval = exact_interval()
    ends = tuple(interval.sigmas.tolist())
    plain = descend(on_one_interval(interval), 1, ends, PLAIN, OPTIONS)
    scaled = descend(on_one_interval(interval), 1, ends, PLAIN, replace(OPTIONS, scale_range=0.1, scale_time=True))
    assert plain.points.scale_dir is None and plain.points.scale_time is None
    for scale in (scaled.points.scale_dir, scaled.points.scale_time):
        assert all(0.9 < s < 1.1 for s in scale) and any(abs(s - 1) > 1e-3 for s in scale)
    assert scaled.residual < plain.residual


def test_a_start_point_stays_at_the_start():
    interval, start = exact_interval(), Points((0.0, 0.5), (0.5, 0.5))
    options = replace(OPTIONS, scale_range=0.3, start_point=True)
    found = descend(on_one_interval(interval), 1, tuple(interval.sigmas.tolist()), start, options)
    assert table_of([found.points]).start_point and 0.5 != found.points.positions[1] > 0
    assert found.points.scale_dir is not None and found.points.scale_time is None
    assert found.residual < 0.5 * distill_loss(interval, start, False).residual


def test_time_scales_stop_at_the_largest_sigma():
    options = replace(OPTIONS, scale_range=0.5, max_sigma=1.0)
    raw = torch.tensor([[-2.0, 1.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    r, _, _, c = point_columns(raw, (1.0, 0.5), options)
    inner = 0.5**r
    assert (c * inner <= 1 + 1e-12).all() and float((c * inner)[0]) == pytest.approx(1) and float(c[1]) > 1.3


def test_never_worse_than_its_start():
    interval = exact_interval()
    start = Points((0.25, 0.75), (0.5, 0.5))
    before = distill_loss(interval, start, False).residual
    wild = descend(on_one_interval(interval), 1, tuple(interval.sigmas.tolist()), start, replace(OPTIONS, lr=9.0))
    assert wild.residual <= before


def test_parameters_come_back_as_the_points():
    scaled = replace(PLAIN, scale_dir=(0.9, 1.1))
    for points in (PLAIN, scaled, replace(scaled, scale_time=(1.0, 0.85))):
        options = replace(OPTIONS, scale_range=0.2)
        columns = point_columns(raw_parameters(points, options), (1.0, 0.5), options)
        torch.testing.assert_close(columns, torch.cat(list(points.columns().values())), rtol=0, atol=1e-9)
    corner = point_columns(raw_parameters(Points((0.02, 0.98), (0.05, 0.95)), OPTIONS), (1.0, 0.5), OPTIONS)
    torch.testing.assert_close(corner, torch.tensor([[0.02, 0.98], [0.05, 0.95]]).double(), rtol=0, atol=0.004)


@pytest.mark.parametrize("positions", [(0.97, 0.3), (0.5, 0.5), (0.99, 0.99), (0.01, 0.01), (0.9899, 0.99)])
def test_result_can_be_drawn(positions):
    points = drawable(
        Points(positions, (0.7, 0.3), (1.1, 0.9), (1.2, 0.8)), (1.0, 0.5), replace(OPTIONS, max_sigma=1.0)
    )
    r = points.positions
    assert r[0] >= 0.01 - 1e-12 and r[1] <= 0.99 + 1e-12 and r[1] - r[0] >= 0.01 - 1e-12
    base_parameters(table_of([points]), TableSpace(2, True, True), 30.0)
    if positions == (0.97, 0.3):
        assert (points.positions, points.weights, points.scale_dir) == ((0.3, 0.97), (0.3, 0.7), (0.9, 1.1))


class Frozen(GaussianBackbone):
    @torch.no_grad()
    def drift(self, x, sigma, conditioning):
        return super().drift(x, sigma, conditioning)


def worker(backbone=None):
    return RolloutWorker(backbone or GaussianBackbone(components=3), 2.0, None, None)


def test_a_drift_without_a_gradient_is_named():
    shard = Shard(PROMPTS, SEEDS, 3, (), 4)
    assert worker(Frozen(components=3)).distill_loss(shard, PLAIN, False).gradient.any() == np.False_
    with pytest.raises(ModelError, match="gives no gradient"):
        worker(Frozen(components=3)).distill_loss(shard, PLAIN, True)


def test_pictures_before_the_gradient_do_no_harm():
    """They are made in inference mode, whose tensors no graph can keep."""
    shard = Shard(PROMPTS, SEEDS, 3, (), 4)
    used = worker()
    used.sample(Sampler("epd", 1, "t", "t", table_of([PLAIN])), PROMPTS, SEEDS)
    found = used.distill_loss(shard, PLAIN, True)
    np.testing.assert_array_equal(found.gradient, worker().distill_loss(shard, PLAIN, True).gradient)


STAGE = StageOne(3, 2, PROMPTS, SEEDS, shard_size=3, teacher_steps=4, grid=7, min_weight=0.05)


@pytest.mark.parametrize("options", [{}, {"afs": True, "order": 2}])
def test_number_and_order_of_workers_change_no_bit(options):
    stage, descent = (
        replace(STAGE, **options),
        replace(OPTIONS, steps=6, batch=2, scale_range=0.1, scale_time=True, max_sigma=1.0),
    )
    sigmas = GaussianBackbone().sigmas(3).tolist()

    three = [worker() for _ in range(3)]

    def backwards(method, calls):
        answers = [getattr(three[i % 3], method)(*c) for i, c in reversed(list(enumerate(calls)))]
        return answers[::-1]

    one = fit_table(on(worker()), stage, sigmas, descent)
    assert one == fit_table(backwards, stage, sigmas, descent)
    left = [loss.residual for loss in losses(on(worker()), stage, one)]
    assert left == [fit.residual for fit in one]


def test_sharding_changes_the_gradient_by_rounding_alone():
    whole = worker().distill_loss(Shard(PROMPTS, SEEDS, 3, FIRST, 4), SCALED, True)
    parts = [
        worker().distill_loss(Shard(PROMPTS[i:j], SEEDS[i:j], 3, FIRST, 4), SCALED, True) for i, j in ((0, 3), (3, 8))
    ]
    summed = parts[0] + parts[1]
    assert summed.distance == pytest.approx(whole.distance, rel=1e-5) and summed.size == whole.size
    np.testing.assert_allclose(summed.gradient, whole.gradient, rtol=1e-4)


def test_beats_least_squares_from_its_table():
    sigmas = GaussianBackbone().sigmas(3).tolist()
    stage = replace(STAGE, shard_size=8, grid=3)  # coarse enough to leave something
    coarse = fit_table(on(worker()), stage, sigmas)
    finer = fit_table(on(worker()), stage, sigmas, OPTIONS)
    assert finer[0].residual < 0.7 * coarse[0].residual
    assert as_table(finer).intervals == 3


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("distill.method=gradients", "distill.method: unknown 'gradients'; did you mean 'gradient'?"),
        ("distill.scale_range=1.0", "distill.scale_range: is 1.0, less than 1 is needed"),
        ("distill.steps=0", "distill.steps: is 0, at least 1 is needed"),
        ("distill.lr=0.0", "distill.lr: is 0.0, more than 0 is needed"),
        ("distill.batch=0", "distill.batch: is 0, at least 1 is needed"),
    ],
)
def test_bad_options_are_one_line_each(override, problem):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(problem)


@pytest.mark.parametrize("method", ["least_squares", "gradient"])
@pytest.mark.parametrize(("options", "columns"), [((), 3), (("rdpo.scale_dir=false",), 2)])
def test_a_run_finds_the_scales_that_its_policy_keeps(method, options, columns):
    config = load_config(None, [f"distill={{method: {method}, steps: 1}}", *options])
    own = worker()
    facts = own.describe(config.solver.intervals)
    stage = stage_one(config, PROMPTS, SEEDS)
    fits = fit_table(on(own), stage, facts.sigmas, descent_of(config, facts))
    for fit in fits:
        assert len(fit.points.columns()) == columns and fit.points.positions[0] == 0
    space = TableSpace(3, scale_dir=config.rdpo.scale_dir, start_point=True)
    assert base_parameters(as_table(fits), space, 30.0).isfinite().all()


@pytest.mark.slow
def test_runs_on_actors_as_in_the_driver(build):
    overrides = ("cluster.rollout_actors=2", "cluster.rollout_cpus=0.25", "cluster.images_per_job=3")
    found = []
    for algo in (build(), build(*overrides)):
        found.append(fit_table(algo.work, STAGE, algo.facts.sigmas, replace(OPTIONS, steps=3)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", families.ONE_OF_EACH)
def test_every_family_has_the_gradient_of_finite_differences(name):
    """After pictures, and checkpointed: what the network makes on the way must serve a graph."""
    backbone = families.backbones(name)
    used = RolloutWorker(backbone, backbone.default_guidance, None, None)
    prompts, seeds = tuple(families.PROMPTS), tuple(families.SEEDS)
    used.sample(Sampler("epd", 1, "t", "t", table_of([PLAIN])), prompts, seeds)
    shard = Shard(prompts, seeds, 3, FIRST, 2)
    found = used.distill_loss(shard, SCALED, True).gradient
    plain = distill_loss(used.states.interval(shard), SCALED, True, checkpointed=False).gradient
    np.testing.assert_array_equal(found, plain)
    columns = np.array([c[0].tolist() for c in SCALED.columns().values()])
    h = 4e-4  # the embedded timestep bends the loss within a hundredth
    for row, k in ((0, 0), (0, 1), (2, 0), (3, 1)):
        there = []
        for sign in (1, -1):
            moved = columns.copy()
            moved[row, k] += sign * h
            there.append(used.distill_loss(shard, Points(*map(tuple, moved)), False).distance)
        assert (there[0] - there[1]) / (2 * h) == pytest.approx(found[row, k], rel=0.02, abs=2e-3 * abs(found).max())
