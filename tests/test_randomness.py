"""One door for all random numbers: no two streams meet, and nothing draws elsewhere."""

import ast
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from epd_ray.config.loading import load_config
from epd_ray.policy.minibatches import image_order, minibatch_problem
from epd_ray.randomness import (
    Purpose,
    noise_seeds,
    plain_seed,
    request_seeds,
    seeded_construction,
    stream,
    torch_generator,
)
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.session import rdpo_config

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2, 7)
ELSEWHERE = {"epd_ray.policy.network": "torch initialises the layers of a network from its global state"}
SEEDING = {"default_rng", "SeedSequence", "RandomState", "PCG64", "manual_seed", "manual_seed_all", "seed_all"}
GLOBAL = ("random", "np.random", "numpy.random", "torch.random")


def test_streams_of_all_purposes_and_iterations_have_no_seed_in_common() -> None:
    drawn = {
        (seed, purpose, index): set(request_seeds(stream(purpose, seed, index), 64).tolist())
        for seed in SEEDS
        for purpose in Purpose
        for index in range(40)
    }
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values())) == len(drawn) * 64


@pytest.mark.parametrize("same_latent", [True, False])
def test_no_picture_that_is_judged_has_noise_of_training(same_latent: bool) -> None:
    prompts = [f"prompt {i}" for i in range(16)]
    for seed in SEEDS:
        run = load_config(None, [f"seed={seed}", f"rdpo.same_latent={str(same_latent).lower()}"])
        config = rdpo_config(run, prompts)
        found = {p: set(noise_seeds(p, seed, 256)) for p in (Purpose.STAGE_ONE, Purpose.VALIDATION, Purpose.TEST)}
        rollouts = [[r for job in propose(config.batch_plan, prompts, i) for r in job] for i in range(20)]
        noise = {i: {r.noise_seed for r in requests} for i, requests in enumerate(rollouts)}
        actions = {f"actions {i}": {r.action_seed for r in requests} for i, requests in enumerate(rollouts)}
        assert {len(s) for s in noise.values()} == {8 if same_latent else 32}
        assert {len(s) for s in actions.values()} == {32}
        sets = {**found, **{f"noise {i}": seeds for i, seeds in noise.items()}, **actions}
        assert not [(a, b) for a, b in combinations(sets, 2) if sets[a] & sets[b]]


def test_a_stream_follows_from_its_name_alone() -> None:
    first, again = (stream(Purpose.TEST, 3, 2).random(4) for _ in range(2))
    assert np.array_equal(first, again)
    assert noise_seeds(Purpose.TEST, 3, 9)[:4] == noise_seeds(Purpose.TEST, 3, 4)
    assert plain_seed(Purpose.TEST, 3) == noise_seeds(Purpose.TEST, 3, 1)[0] < 2**62
    # The number of a purpose is part of every run's results.
    assert {p.name: int(p) for p in Purpose} | {"TRAINING": 1, "STAGE_ONE": 2, "VALIDATION": 3, "TEST": 4} == {
        p.name: int(p) for p in Purpose
    }


def test_a_latent_is_that_of_a_pipeline_with_the_same_seed() -> None:
    expected = torch.randn(3, generator=torch.Generator().manual_seed(2**61 + 1))
    assert torch.equal(torch.randn(3, generator=torch_generator(2**61 + 1)), expected)


def test_construction_restores_the_global_state() -> None:
    state = torch.get_rng_state()
    with seeded_construction(5):
        first = torch.nn.Linear(2, 2).weight
    with seeded_construction(5):
        assert torch.equal(first, torch.nn.Linear(2, 2).weight)
    assert torch.equal(state, torch.get_rng_state())


def draws(tree: ast.Module) -> Iterator[str]:
    """Calls that seed a generator or use a global one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, method = name.rpartition(".")
            if (method or name) in SEEDING or owner in GLOBAL:
                yield name


def test_random_numbers_come_from_one_module() -> None:
    bad = (
        "np.random.default_rng(0)",
        "random.random()",
        "np.random.seed(1)",
        "torch.manual_seed(0)",
        "SeedSequence(1)",
    )
    assert list(draws(ast.parse("; ".join(bad)))) == [call.partition("(")[0] for call in bad]
    assert not list(draws(ast.parse("rng.integers(3); stream(Purpose.TEST, 0).normal(); def_.random_scene(rng)")))
    found = {}
    for path in sorted((ROOT / "epd_ray").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if calls := list(draws(ast.parse(path.read_text()))):
            found[name] = calls
    assert found.pop("epd_ray.randomness")
    assert found.keys() <= ELSEWHERE.keys(), found


def test_orders_hold_each_image_once_an_epoch() -> None:
    order = image_order(0, 5, 12, 3).reshape(3, 12)
    assert order[0].tolist() == list(range(12)) and len({tuple(row) for row in order.tolist()}) == 3
    assert (np.sort(order, axis=1) == np.arange(12)).all()
    assert np.array_equal(order.ravel(), image_order(0, 5, 12, 3))
    assert not np.array_equal(order.ravel(), image_order(0, 6, 12, 3))
    assert (image_order(0, 5, 12, 3, shuffle=False).reshape(3, 12) == np.arange(12)).all()


@pytest.mark.parametrize("minibatch", [1, 2, 8, 16, 32, 33, 100])
def test_divisors_and_all_images_are_minibatches(minibatch: int) -> None:
    assert minibatch_problem(minibatch, 32) is None


@pytest.mark.parametrize(
    ("minibatch", "images", "fix"), [(24, 32, "16 or 32"), (3, 32, "2 or 4"), (5, 7, "1 or 7"), (16, 36, "12 or 18")]
)
def test_other_minibatches_are_refused_with_the_nearest_divisors(minibatch: int, images: int, fix: str) -> None:
    problem = minibatch_problem(minibatch, images)
    assert problem is not None
    assert problem.startswith(f"is {minibatch}, which does not divide the {images} images")
    assert problem.endswith(f"set {fix}")
