from collections.abc import Sequence

import numpy as np
import pytest

from epd_ray.rewards import mixing
from epd_ray.rewards.mixing import Mixer

RNG = np.random.default_rng(0)


def scores(count: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    small, large = RNG.normal(0.3 + shift, 0.01, count), RNG.normal(20.0 + shift, 2.0, count)
    return {"a": small.astype(np.float32), "b": large.astype(np.float32)}


class Anywhere(Mixer):
    """The mixer of a run whose heads judge every prompt, so that the prompts do not matter."""

    def train(self, scores: dict[str, np.ndarray], prompts: Sequence[str] = ()) -> np.ndarray:
        return super().train(scores, prompts)

    def held_out(self, scores: dict[str, np.ndarray], prompts: Sequence[str] = ()) -> np.ndarray:
        return super().held_out(scores, prompts)


def mixer(mode: str) -> Anywhere:
    return Anywhere({"a": 1.0, "b": 1.0}, {"a": "hpsv2.1", "b": "pickscore"}, mode)


def test_raw_values_are_mixed_as_they_are() -> None:
    batch, plain = scores(8), mixer("none")
    plain.observe([batch])
    np.testing.assert_allclose(plain.train(batch), (batch["a"] + batch["b"]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(plain.held_out(batch), plain.train(batch))


def test_the_references_clamps_do_not_move() -> None:
    batch, reference = scores(8), mixer("reference")
    reference.observe([scores(8, shift=3.0)])
    np.testing.assert_allclose(reference.train(batch), (batch["a"] + batch["b"] / 26) / 2, rtol=1e-6)
    np.testing.assert_array_equal(reference.held_out(batch), reference.train(batch))


def test_z_scores_give_heads_of_any_size_the_same_say() -> None:
    batches, running = [scores(16), scores(16)], mixer("zscore")
    running.observe(batches)
    rewards = np.concatenate([running.train(batch) for batch in batches])
    pooled = {name: np.concatenate([batch[name] for batch in batches]) for name in ("a", "b")}
    expected = sum((v - v.mean()) / v.std() for v in pooled.values()) / 2
    np.testing.assert_allclose(rewards, expected, atol=1e-4)


def test_the_window_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "WINDOW", 16)
    running, fresh, late = mixer("zscore"), mixer("zscore"), scores(16)
    running.observe([scores(16, shift=5.0)])
    running.observe([late])
    fresh.observe([late])
    np.testing.assert_array_equal(running.train(late), fresh.train(late))


def test_held_out_z_scores_stay_comparable_and_go_on_after_a_restart() -> None:
    first, later = scores(16), scores(16, shift=1.0)
    running = mixer("zscore")
    assert abs(running.held_out(first).mean()) < 1e-4
    running.observe([later])
    raised = running.held_out(later)
    assert raised.mean() > 1
    again = mixer("zscore")
    again.restore(running.state())
    np.testing.assert_array_equal(again.held_out(later), raised)
    np.testing.assert_array_equal(again.train(first), running.train(first))
    assert running.train(later).mean() == pytest.approx(0, abs=1e-4)


def test_a_run_with_z_scores_goes_on_exactly(build) -> None:
    heads = "rewards={a: {head: simulated, replicas: 0}, b: {head: simulated, replicas: 0, options: {target: 0.2}}}"
    options = [
        heads,
        "rdpo.normalisation=zscore",
        "rdpo.prompts_per_iteration=2",
        "rdpo.minibatch_size=4",
        "rdpo.staleness=0",
    ]
    whole, again = build(*options), build(*options)
    for _ in range(2):
        whole.train()
    state = whole.export_state()
    whole.train()
    again.import_state(state)
    again.train()
    assert [r.reward for r in again.last.rollouts] == [r.reward for r in whole.last.rollouts]
    assert again.checksum() == whole.checksum()
    spread = np.std([r.reward for r in whole.last.rollouts])
    assert 0.2 < spread < 2
