"""The policy network: where its weights come from, and what the driver does with it after an update."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from epd_ray.policy.dirichlet import TableSpace
from epd_ray.policy.network import PolicyNetwork, PolicySpec

SPEC = PolicySpec(TableSpace(2), ((1.0,) * 5,) * 3, 50.0, width=128, depth=2)


@contextmanager
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The global random state stays as it is, and nobody asks torch for a CUDA device."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a CUDA device or the global random state was touched")

    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        for name in ("device_count", "get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
            patch.setattr(torch.cuda, name, refuse)
        for owner, name in ((torch.random, "fork_rng"), (torch, "manual_seed")):
            patch.setattr(owner, name, refuse)
        yield
    assert torch.equal(before, torch.get_rng_state())


def test_weights_come_from_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with untouched(monkeypatch):
        one, same, other = (PolicyNetwork(replace(SPEC, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert not torch.equal(one.layers[0][2].weight, one.layers[1][2].weight)


def test_weights_have_torchs_usual_spread() -> None:
    network = PolicyNetwork(replace(SPEC, base=((1.0,) * 5,) * 200))
    assert float(network.embedding.weight.detach().std()) == pytest.approx(1, rel=0.02)
    usual = torch.nn.Linear(128, 128)
    for values, expected in ((network.layers[1][2].weight, usual.weight), (network.layers[1][2].bias, usual.bias)):
        assert float(values.detach().std()) == pytest.approx(float(expected.detach().std()), rel=0.15)
        assert float(values.detach().abs().max()) <= 128**-0.5


@pytest.mark.slow
def test_an_update_at_the_driver_touches_no_device_and_scores_what_an_actor_drew(build, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    algo = build("cluster.rollout_actors=1", "cluster.rollout_cpus=0.25", "cluster.learner_actors=1")
    calm, network = build(), algo._policies._network
    with untouched(monkeypatch):
        for _ in range(2):
            algo.training_step()
    assert algo._policies._network is network and all(p.device.type == "cpu" for p in network.parameters())
    assert np.array_equal(algo._policies.parameters(2), network.parameters_array())
    assert not np.array_equal(algo._policies.parameters(2), algo._policies.parameters(1))
    calm.train(), calm.train()
    assert algo._rewards.actors == [] and algo.checksum() == calm.checksum()
