"""Stage 1 by least squares: the small problem exactly, and the table against what it replaces."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from epd_ray.backbones.gaussian import GaussianBackbone
from epd_ray.distill import Distiller, DistillTask, as_table, best_points, position_grid, refine, simplex_least_squares
from epd_ray.sampling import Sampler, baseline, noises

PROMPTS = tuple(f"prompt {i}" for i in range(8))
SEEDS = tuple(range(8))


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


def task(prompts, seeds, fits=(), grid=7):
    return DistillTask(
        3, tuple(f.positions for f in fits), tuple(f.weights for f in fits), position_grid(grid), 4, prompts, seeds
    )


def distil(backbone):
    distiller, fits = Distiller(backbone, 1.0), []
    for _ in range(3):
        fits.append(best_points(distiller.normal_equations(task(PROMPTS, SEEDS, fits)), position_grid(7), 2, 0.05))
    return as_table(fits)


def test_shards_add_up_to_the_whole():
    backbone = GaussianBackbone(components=2)
    whole = Distiller(backbone, 1.0).normal_equations(task(PROMPTS, SEEDS))
    halves = [Distiller(backbone, 1.0).normal_equations(task(PROMPTS[i], SEEDS[i])) for i in (slice(4), slice(4, 8))]
    total = halves[0] + halves[1]
    np.testing.assert_allclose(total.gram, whole.gram, rtol=1e-6)
    np.testing.assert_allclose(total.cross, whole.cross, rtol=1e-5, atol=1e-8)
    assert total.target == pytest.approx(whole.target, rel=1e-6)


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


def test_teacher_states_are_remade_when_lost():
    backbone = GaussianBackbone(components=2)
    warm = Distiller(backbone, 1.0)
    first = best_points(warm.normal_equations(task(PROMPTS, SEEDS)), position_grid(7), 2, 0.05)
    again = task(PROMPTS, SEEDS, [first])
    np.testing.assert_array_equal(
        warm.normal_equations(again).gram, Distiller(backbone, 1.0).normal_equations(again).gram
    )


def test_refined_schedule_keeps_its_ends():
    fine = refine(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), 4)
    assert len(fine) == 9 and fine[0] == 1.0 and fine[4] == 0.5 and fine[-1] == 0.1
