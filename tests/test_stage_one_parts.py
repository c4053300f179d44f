"""Stage 1 for the further parts of a table: noise levels, history, guidance scales, and passes that are left out."""

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from epd_ray.backbones.gaussian import GaussianBackbone
from epd_ray.config.loading import load_config
from epd_ray.drawing.worker import BackboneFacts, RolloutWorker, require_guidance
from epd_ray.errors import ConfigError, ModelError, TableError
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.solvers.epd import epd
from epd_ray.solvers.grid import levels, regrid
from epd_ray.stage_one.fit import StageOne, fit_table, losses
from epd_ray.stage_one.gradient import Descent
from epd_ray.stage_one.grid import LocalErrors, best_path, interval_costs, local_errors, shares_at
from epd_ray.stage_one.least_squares import best_with_history, equations_with_history
from epd_ray.stage_one.reuse import best_reuse
from epd_ray.stage_one.shard import Parts, Shard, ShardStates, as_table
from epd_ray.stage_one.teacher import fine_path, refine, teacher_states

PROMPTS = tuple(f"prompt {i}" for i in range(6))
SEEDS = tuple(range(6))
N, STEPS, SCALE = 4, 4, 3.0
ONE = StageOne(
    N, 1, PROMPTS, SEEDS, shard_size=3, teacher_steps=STEPS, grid=5, min_weight=0.05, start_point=True,
    scale_range=0.7, guidance_scale=SCALE,
)  # fmt: skip
TWO = replace(ONE, points=2)


class Guided(GaussianBackbone):
    """A mixture whose prompt bends the drift once more; notes the passes of its network."""

    classifier_free = True

    def __init__(self) -> None:
        super().__init__(components=2, size=4)
        self.passes = 0

    def _parts(self, x, sigma, conditioning):
        level = sigma.reshape(-1, 1, 1, 1)
        return super().drift(x, sigma, conditioning), 0.4 * torch.cos(2 * x + level) * level

    def drift(self, x, sigma, conditioning):
        self.passes += 2 * len(x)
        empty, difference = self._parts(x, sigma, conditioning)
        return empty + SCALE * difference

    def guided(self, x, sigma, conditioning, scale, difference):
        empty, own = self._parts(x, sigma, conditioning)
        factor = SCALE if scale is None else scale.to(x).reshape(-1, *[1] * (x.ndim - 1))
        if difference is not None:
            self.passes += len(x)
            return empty + own + (factor - 1) * difference, None
        self.passes += 2 * len(x)
        return empty + factor * own, own


def on(*workers):
    """Runs tasks on workers in turn."""
    return lambda method, calls: [getattr(workers[i % len(workers)], method)(*c) for i, c in enumerate(calls)]


def worker(backbone):
    return RolloutWorker(backbone, SCALE, None, None)


def fitted(stage, backbone=None, workers=1, descent=None):
    backbone = backbone or Guided()
    return fit_table(on(*(worker(backbone) for _ in range(workers))), stage, backbone.sigmas(N).tolist(), descent)


def ends(table):
    """The states of the deployed solver and of the teacher at the ends of the table's intervals."""
    backbone = Guided()
    drift = ConditionedDrift(backbone, backbone.encode(PROMPTS, SCALE))
    start, sigmas, reached = backbone.initial(noises(backbone, SEEDS)), backbone.sigmas(N), []
    epd(drift, start, sigmas, table, form="flow", callback=lambda i, sigma, x: reached.append(x))
    fine = refine(sigmas, STEPS)
    places = [int((fine - s).abs().argmin()) for s in levels(table, sigmas)]
    assert torch.allclose(fine[places], levels(table, sigmas), rtol=1e-9)
    return [start, *reached], [start, *teacher_states(drift, start, sigmas, STEPS, places)]


def distance(table):
    """The squared distance to the teacher at the end."""
    ours, teacher = ends(table)
    return float((ours[-1] - teacher[-1]).square().sum())


# -- noise levels -----------------------------------------------------------------------------------------------------


def turning(x, sigma):
    """dx/dsigma = 3.2 sigma^3 J x, whose solution turns by 0.8 sigma^4: nearly all of it where sigma is large."""
    return 3.2 * sigma.reshape(-1, 1) ** 3 * torch.stack([-x[:, 1], x[:, 0]], 1)


def turned(x, sigma):
    """The exact solution at sigma from x at 1."""
    angle = torch.tensor(0.8 * (sigma**4 - 1), dtype=torch.float64)
    return x @ torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).reshape(2, 2)


def test_the_path_is_that_of_brute_force_and_beats_even_steps() -> None:
    x = torch.tensor([[1.0, -0.4], [0.3, 0.8]], dtype=torch.float64)
    schedule = torch.linspace(1.0, 0.02, 4, dtype=torch.float64)
    path = fine_path(turning, x, schedule, 4)
    exact = turned(x, 0.02)
    torch.testing.assert_close(path.states[-1], exact, rtol=0, atol=0.03)
    for i in (0, 5):
        torch.testing.assert_close(path.drifts[i], turning(path.states[i], path.sigmas[i].expand(2)))
    costs, last = interval_costs(local_errors(path), path.sigmas.tolist()), len(path.sigmas) - 1
    for i, j in ((0, 3), (4, 12)):
        missed = path.states[i] + (path.sigmas[j] - path.sigmas[i]) * path.drifts[i] - path.states[j]
        assert costs[i, j] == pytest.approx(float(missed.square().sum()), rel=1e-9)

    def total(places):
        return sum(costs[i, j] for i, j in pairwise(places))

    best = best_path(costs, 3)
    every = [(0, *inner, last) for inner in combinations(range(1, last), 2)]
    assert total(best) == min(map(total, every)) and best == min(every, key=total)

    def left(places):
        y = x
        for a, b in pairwise(path.sigmas[list(places)].tolist()):
            y = y + (b - a) * turning(y, y.new_full((2,), a))
        return float((y - exact).square().sum())

    even = (0, 4, 8, 12)
    # The path is the best in the sum of its local errors; what is left at the end also has their interplay in it.
    assert total(best) < 0.7 * total(even) and left(best) < 0.85 * left(even)


def test_a_scaled_step_costs_what_its_best_scale_leaves() -> None:
    x = torch.tensor([[1.0, -0.4], [0.3, 0.8]], dtype=torch.float64)
    path = fine_path(turning, x, torch.linspace(1.0, 0.02, 4, dtype=torch.float64), 4)
    costs = interval_costs(local_errors(path), path.sigmas.tolist(), 0.3)
    for i, j in ((0, 3), (0, 12)):
        step, way = (path.sigmas[j] - path.sigmas[i]) * path.drifts[i], path.states[j] - path.states[i]
        tried = [float((o * step - way).square().sum()) for o in np.linspace(0.7, 1.3, 6001)]
        assert costs[i, j] == pytest.approx(min(tried), rel=1e-6, abs=1e-9)


def test_shares_lead_back_to_the_chosen_levels() -> None:
    schedule = GaussianBackbone().sigmas(N)
    chosen = refine(schedule, 5)[[0, 3, 4, 15, 20]]
    shares = torch.tensor(shares_at(schedule, chosen), dtype=torch.float64)
    torch.testing.assert_close(regrid(schedule, shares), chosen, rtol=1e-12, atol=0)
    even = torch.tensor(shares_at(schedule, schedule), dtype=torch.float64)
    torch.testing.assert_close(even, torch.full((N,), 1 / N, dtype=torch.float64), rtol=1e-12, atol=0)


# -- history and scale ------------------------------------------------------------------------------------------------


def test_history_and_scale_are_those_of_numpy() -> None:
    """A single point at the start: its scale and two weights, against numpy on all drifts at once."""
    fits = fitted(replace(ONE, parts=Parts(history=2)))[:2]
    shard = Shard(PROMPTS, SEEDS, N, tuple(f.points for f in fits), STEPS, parts=Parts(history=2))
    interval = ShardStates(Guided(), SCALE).interval(shard)
    now, *older = interval.drifts
    columns = torch.stack([now, *(now - d for d in older)]).flatten(1).double().numpy()
    (a, b), way = interval.sigmas.tolist(), (interval.target - interval.x).flatten().double().numpy()
    solution, rest, *_ = np.linalg.lstsq(columns.T * (b - a), way, rcond=None)
    assert len(solution) == 3 and 0.3 < solution[0] < 1.7
    found = best_with_history(equations_with_history(interval, (0.0,), 2), (0.0,), 1, 0.05, 0.7, 2)
    assert [*found.points.scale_dir, *found.points.history] == pytest.approx(solution.tolist(), rel=1e-4)
    assert found.residual == pytest.approx(float(rest[0] / (way @ way)), rel=1e-4)


@pytest.mark.parametrize("stage", [ONE, TWO], ids=["one point", "two points"])
@pytest.mark.parametrize(
    "parts",
    [Parts(history=1), Parts(history=3), Parts(guidance=True), Parts(reuse=(1, 3)), Parts(2, True, (2,))],
    ids=str,
)
@pytest.mark.parametrize("free", [False, True], ids=["schedule", "own levels"])
def test_the_residual_is_that_of_the_solver_that_is_deployed(stage, parts, free) -> None:
    fits = fitted(replace(stage, parts=parts, noise_levels=free))
    table = as_table(fits)
    assert (table.grid is not None) == free and table.reused == [*parts.reuse]
    assert (table.history is None) == (not parts.history) and (table.guidance is None) == (not parts.guidance)
    ours, teacher = ends(table)
    for i, fit in enumerate(fits):
        missed, way = ours[i + 1] - teacher[i + 1], teacher[i + 1] - ours[i]
        assert fit.residual == pytest.approx(float(missed.square().sum() / way.square().sum()), rel=2e-3, abs=1e-6)


def test_each_part_comes_nearer_to_the_teacher() -> None:
    plain = distance(as_table(fitted(ONE)))
    history = distance(as_table(fitted(replace(ONE, parts=Parts(history=2)))))
    guidance = distance(as_table(fitted(replace(ONE, parts=Parts(guidance=True)))))
    levels = distance(as_table(fitted(replace(ONE, noise_levels=True))))
    whole = distance(as_table(fitted(replace(ONE, parts=Parts(2, True), noise_levels=True))))
    assert history < 0.95 * plain and guidance < 0.97 * plain and levels < 0.6 * plain and whole < 0.1 * plain


# -- what is left out -------------------------------------------------------------------------------------------------


def test_what_changes_least_is_reused() -> None:
    """Against all choices, with a difference that stands still in the middle."""
    at = np.array([0.0, 3.0, 3.1, 3.2, 7.0, 7.5])
    far = (at[:, None] - at[None]) ** 2
    widths, scales = [0.2, 0.2, 0.1, 0.2, 0.2, 0.1], [3.0, 3.0, 3.0, 2.0, 3.0, 3.0]

    def harm(chosen):
        kept, total = 0, 0.0
        for i in range(6):
            kept = kept if i in chosen else i
            total += far[kept, i] * (widths[i] * (scales[i] - 1)) ** 2
        return total

    for count in range(6):
        found = best_reuse(far, widths, scales, count)
        assert len(found) == count and harm(found) == pytest.approx(min(map(harm, combinations(range(1, 6), count))))
    assert best_reuse(far, widths, scales, 2) == (2, 3)


def test_the_number_of_passes_to_leave_out_is_kept_and_fitted_with() -> None:
    fits = fitted(replace(ONE, reuse_count=2))
    table = as_table(fits)
    assert len(table.reused) == 2 and table.cost().network_passes(SCALE, True) == 2 * N - 2
    again = fitted(replace(ONE, parts=Parts(reuse=tuple(table.reused))))
    assert [f.points for f in again] == [f.points for f in fits]
    others = [
        as_table(fitted(replace(ONE, parts=Parts(reuse=chosen)))) for chosen in combinations(range(1, N), 2)
    ]  # fmt: skip
    assert distance(table) <= sorted(map(distance, others))[1]


# -- the work ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [ONE, TWO], ids=["one point", "two points"])
def test_passes_are_those_of_the_network(stage) -> None:
    backbone = Guided()
    whole = replace(stage, parts=Parts(history=1, guidance=True), noise_levels=True, reuse_count=1)
    fits = fitted(whole, backbone)
    assert sum(fit.passes for fit in fits) == backbone.passes
    plain = Guided()
    assert sum(fit.passes for fit in fitted(stage, plain)) == plain.passes


def test_guidance_and_history_of_a_single_point_take_no_pass() -> None:
    passes = [sum(f.passes for f in fitted(replace(ONE, parts=p))) for p in (Parts(1), Parts(3, True))]
    # The teacher's two evaluations in each of its steps, and one at each of the student's starts.
    assert passes == [len(PROMPTS) * 2 * (2 * N * STEPS + N)] * 2


def test_number_of_workers_changes_no_bit() -> None:
    whole = replace(TWO, parts=Parts(2, True), noise_levels=True, reuse_count=1)
    assert fitted(whole) == fitted(whole, workers=3)


def test_gradient_goes_on_from_the_whole_fit() -> None:
    stage = replace(TWO, parts=Parts(history=1, guidance=True))
    before = fitted(stage)
    descent = Descent(steps=8, lr=0.05, batch=2, min_weight=0.05, scale_range=0.7, start_point=True)
    after = fitted(stage, descent=descent)
    assert after[0].residual <= before[0].residual * (1 + 1e-3)
    assert all(f.points.guidance and f.points.history for f in after)
    left = losses(on(worker(Guided())), stage, after)
    assert [loss.residual for loss in left] == pytest.approx([f.residual for f in after], rel=1e-4)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"noise_levels": True, "teacher_steps": 1}, "teacher_steps is 1, at least 2 .* two of them would meet"),
        ({"parts": Parts(history=N)}, "history is 4, below 4 is needed"),
        ({"parts": Parts(guidance=True), "guidance_scale": 1.0}, "guidance_scale is 1, above 1 is needed"),
    ],
)
def test_a_stage_that_cannot_be_fitted_is_named(changes, named) -> None:
    with pytest.raises(ConfigError, match=named):
        replace(ONE, **changes)


def test_levels_that_meet_are_named() -> None:
    with pytest.raises(TableError, match="4 intervals do not fit between 4 noise levels: two of them would meet"):
        best_path(np.zeros((4, 4)), 4)
    broken = LocalErrors(np.array([np.nan]), np.zeros((1, 2)), np.zeros((1, 2)))
    with pytest.raises(ModelError, match="not finite"):
        interval_costs(broken, [1.0, 0.5])


FACTS = BackboneFacts("ddpm", "m", "ve", (1.0, 0.1), 4.0, True, {}, guidable=True)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        (replace(FACTS, guidable=False), "a model of family ddpm has none that could differ"),
        (replace(FACTS, classifier_free=False), "leaves out passes without the prompt, but .* makes none"),
        (replace(FACTS, guidance_scale=1.0), "the guidance scale is 1, above 1 is needed"),
    ],
)
def test_guidance_of_a_model_without_it_is_named(facts, named) -> None:
    require_guidance(FACTS, scales=True, reuse=True)
    require_guidance(facts, scales=False, reuse=False)
    with pytest.raises(TableError, match=named):
        require_guidance(facts, scales=True, reuse=True)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["solver.reuse=2"], "is 2, at least 0 and below solver.intervals=2"),
        (["solver.history=2"], "is 2, at least 0 and below solver.intervals=2"),
        (["solver.reuse=1", "distill.enabled=false"], "stage 1 chooses the 1 intervals"),
        (["solver.grid=true", "distill.teacher_steps=1"], "teacher_steps is 1, at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, named) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(None, settings)
