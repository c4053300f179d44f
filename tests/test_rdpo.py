"""The algorithm on real Ray actors, with a backbone and a head that cost nothing."""

import os
import random
import signal
import time
from copy import deepcopy
from ipaddress import ip_address
from itertools import chain

import numpy as np
import psutil
import pytest
import ray
import torch

from epd_ray.actors.cluster import require_room
from epd_ray.actors.reward_pool import RewardSpec
from epd_ray.config.loading import load_config
from epd_ray.drawing.sampler import Sampler, baseline
from epd_ray.errors import EpdRayError, ModelError, PlacementError, RewardError
from epd_ray.rdpo import lasting_learner
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.config import RDPOConfig, placement
from epd_ray.rdpo.learner import RDPOLearner
from epd_ray.solvers import SolverTable
from epd_ray.solvers.table import uniform_table
from epd_ray.stage_one.fit import StageOne, fit_table
from epd_ray.storage.checkpoint import load_newest, save_checkpoint
from tests.fakes import drawn

ACTORS = (
    *("cluster.rollout_actors=2", "cluster.rollout_cpus=0.25", "cluster.learner_actors=1"),
    "rewards.sim.replicas=1",
)


def records(algo):
    """The pictures of the last iteration, each as one flat row."""
    return [rollout.record() for rollout in algo.last.rollouts]


def run(algo, iterations):
    for _ in range(iterations):
        algo.train()
    return algo.checksum()


def test_iteration_reports_rows_and_metrics(build):
    algo = build()
    result = algo.train()
    last, rows = algo.last, records(algo)
    assert last.number == 1 and len(rows) == 32
    assert len({r["rollout_id"] for r in rows}) == 32
    groups = {r["group_id"]: {q["prompt"] for q in rows if q["group_id"] == r["group_id"]} for r in rows}
    assert len(groups) == 8 and all(len(prompts) == 1 for prompts in groups.values())
    for r in rows:  # one latent a group
        assert {q["noise_seed"] for q in rows if q["group_id"] == r["group_id"]} == {r["noise_seed"]}
    assert len({r["action_seed"] for r in rows}) == 32
    assert abs(np.mean([r["advantage"] for r in rows])) < 1e-6
    assert last.metrics["losses/behaviour_kl"] == pytest.approx(0, abs=1e-9)  # first iteration: nothing is stale
    assert result["env_runners"]["episode_return_mean"] == pytest.approx(last.metrics["reward/mean"])


def test_starts_as_the_base_table_and_learns(build):
    algo = build("rdpo.staleness=0", "backbone.family=tests.fakes:TableBackbone", "rewards.sim.options={target: 1.0}")
    start = algo.mean_table()
    torch.testing.assert_close(start.positions, algo.config.table.positions.float(), atol=1e-6, rtol=0)
    prompts, seeds = [f"prompt {i}" for i in range(16)], list(range(16))
    before = algo.sample_scored(_sampler(algo, start), prompts, seeds).reward.mean()
    run(algo, 40)
    after = algo.sample_scored(_sampler(algo, algo.mean_table()), prompts, seeds).reward.mean()
    assert after > before + 0.05  # brighter: points and weights move to where sigma is small
    assert (algo.mean_table().positions.mean() - start.positions.mean()) > 0.02


def test_a_lone_start_point_learns_its_scales(build):
    algo = build(
        "solver.points=1",
        "rdpo.staleness=0",
        "backbone.family=tests.fakes:TableBackbone",
        "rewards.sim.options={target: 1.0}",
    )
    run(algo, 20)
    table = algo.mean_table()
    assert table.start_point and table.scale_dir is not None
    assert table.scale_dir.max() < 0.99  # brighter: shorter steps


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [8, 8, 8, 8]),
        ("linear", [8, 6, 4, 2]),
        ("cosine", [8, 6.8284, 4, 1.1716]),
        ("inverse", [8, 3.2, 1.6, 1.0667]),
    ],
)
def test_the_learning_rate_follows_its_schedule(build, schedule, rates):
    overrides = (f"rdpo.lr_schedule={schedule}", "rdpo.lr=8e-3", "rdpo.iterations=4")
    algo, used, state = build(*overrides), [], {}
    for i in range(4):
        if i == 2:
            state = algo.export_state()
        algo.train()
        used.append(algo.last.metrics["losses/learning_rate"] * 1e3)
    assert used == pytest.approx(rates, rel=1e-4)
    again = build(*overrides)
    again.import_state(state)
    assert run(again, 2) == algo.checksum() and again.last.metrics["losses/learning_rate"] * 1e3 == used[-1]


def _sampler(algo, table):
    return Sampler("epd", table.intervals, "t", "t", table)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_staleness_is_exact_and_logged(build, staleness):
    algo = build(f"rdpo.staleness={staleness}")
    seen = [(algo.train(), algo.last.metrics["staleness"])[1] for _ in range(4)]
    assert seen == [min(i, staleness) for i in range(4)]
    versions = {r["policy_version"] for r in records(algo)}
    assert versions == {3 - staleness}
    if staleness:
        assert algo.last.metrics["losses/behaviour_kl"] > 0


@pytest.mark.slow
def test_results_do_not_depend_on_actors_whose_learner_listens_on_loopback_only(build):
    algo = build(*ACTORS)
    assert run(algo, 3) == run(build(), 3)
    (found,) = algo.learner_group.foreach_learner(listening)
    assert found.get() and all(ip_address(ip).is_loopback for ip in found.get())


def listening(_):
    """The addresses that the process of an actor listens on."""
    listens = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    return [address.removeprefix("::ffff:") for address in listens]


def two_heads(first: int, second: int) -> str:
    """Overrides with so many replicas of two heads."""
    return (
        f"rewards={{dark: {{head: simulated, replicas: {first}, options: {{target: 0.2}}}}, "
        f"bright: {{head: simulated, weight: 2, replicas: {second}, options: {{target: 0.9}}}}}}"
    )


def test_heads_in_the_driver_score_as_their_actors_do(build):
    algos = [build(two_heads(*replicas)) for replicas in ((1, 0), (0, 0))]
    assert [len(algo._rewards.actors) for algo in algos] == [1, 0]
    drawn = [algo.sample_scored(baseline("euler", 6), ["a", "b", "c"], [1, 2, 3]) for algo in algos]
    for found in drawn:
        assert list(found.scores) == ["dark", "bright"]
        assert found.scores["dark"].tolist() == drawn[0].scores["dark"].tolist() != found.scores["bright"].tolist()
        assert found.reward.tolist() == drawn[0].reward.tolist()
    assert len({run(algo, 2) for algo in algos}) == 1
    here = algos[1]
    assert placement(here.config)["reward actors"] == [] and set(here.memory()) >= {"reward dark", "reward bright"}
    assert {key for key in here.last.metrics if key.startswith("actors/")} == {"actors/rollout"}
    assert here.last.metrics["time/score"] > 0


def test_another_seed_is_another_run(build):
    assert run(build("seed=1"), 2) != run(build("seed=2"), 2)


def test_no_seed_is_the_default_seed():
    plain, seeded = RDPOConfig(), RDPOConfig().debugging(seed=load_config(None).seed)
    assert (plain.batch_plan, plain.update_plan) == (seeded.batch_plan, seeded.update_plan)
    assert plain.policy_spec == seeded.policy_spec != RDPOConfig().debugging(seed=1).policy_spec


def test_the_learner_waits_for_validations_too(build):
    algo = build("backbone.options={latency: 0.02}")
    run(algo, 1)
    assert algo.last.metrics["wait/learner_for_validation"] == 0
    algo.sample_scored(baseline("euler", 6), ["a", "b"], [1, 2])
    run(algo, 1)
    assert 0.02 < algo.last.metrics["wait/learner_for_validation"] < 5
    run(algo, 1)
    assert algo.last.metrics["wait/learner_for_validation"] == 0


def test_mixed_baseline_and_own_noise_are_the_references(build):
    algo = build("rdpo.baseline=mixed", "rdpo.same_latent=false")
    algo.train()
    rows = records(algo)
    group = [r for r in rows if r["group_id"] == rows[0]["group_id"]]
    assert len(group) == 4 and len({r["prompt"] for r in group}) == 4
    assert len({r["noise_seed"] for r in rows}) == 32


def test_exported_state_continues_bit_identically(build):
    undisturbed = run(build(), 5)
    first = build()
    run(first, 3)
    state = first.export_state()
    second = build()
    second.import_state(state)
    assert second.policy_version == 3
    assert run(second, 2) == undisturbed


def test_rllib_checkpoint_restores(build, tmp_path):
    algo = build()
    run(algo, 2)
    algo.save_to_path(str(tmp_path / "checkpoint"))
    other = build()
    other.restore_from_path(str(tmp_path / "checkpoint"))
    assert other.checksum() == algo.checksum()
    assert run(other, 1) == run(algo, 1)


@pytest.mark.slow
def test_killed_actors_change_nothing(build):
    undisturbed = run(build(), 6)
    algo = build(*ACTORS, "backbone.options={latency: 0.02}")
    run(algo, 2)
    pids = algo.env_runner_group.foreach_env_runner(lambda r: os.getpid(), local_env_runner=False)
    os.kill(pids[0], signal.SIGKILL)
    run(algo, 1)
    ray.kill(algo._rewards.pools["sim"].actors[0], no_restart=True)
    run(algo, 1)
    learner = algo.learner_group._worker_manager.actors()[0]
    ray.kill(learner)
    assert run(algo, 2) == undisturbed


def test_concentration_stays_bounded(build):
    algo = build("rdpo.concentration_bound=1.5", "rdpo.lr=0.05")
    run(algo, 6)
    policy = algo.distribution()
    for part in (policy.segments, policy.weights):
        assert float(part.concentration.sum(-1).max()) <= 1.5 * 30 * (1 + 1e-5)


def test_distilled_table_is_near_the_teacher(build):
    algo = build()
    prompts, seeds = tuple(f"prompt {i}" for i in range(8)), tuple(range(8))
    stage = StageOne(3, 2, prompts, seeds, shard_size=8, teacher_steps=4, grid=7, min_weight=0.05)
    fits = fit_table(algo.work, stage, algo.facts.sigmas)
    assert len(fits) == 3
    assert all(f.residual < 0.05 and abs(sum(f.points.weights) - 1) < 1e-9 for f in fits)


def test_rebase_refuses_after_training(build):
    algo = build()
    algo.train()
    with pytest.raises(RuntimeError, match="after 1 updates"):
        algo.rebase(algo.mean_table())


@pytest.mark.parametrize(("head", "said"), [("NanHead", "not finite"), ("ShortHead", r"shape \(7,\) for 8")])
def test_wrong_reward_stops_with_rollout_ids(build, head, said):
    errors = []
    for replicas in (0, 1):
        algo = build(f"rewards={{bad: {{head: 'tests.fakes:{head}', replicas: {replicas}}}}}")
        with pytest.raises(RewardError, match=f"bad.*{said}") as error:
            algo.train()
        assert error.value.rollout_ids
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("wrong", [{"replicas": -1}, {"max_replicas": 2}, {"python": "/some/python"}])
def test_a_head_in_the_driver_has_no_process_of_its_own(small_ray, wrong):
    spec = RewardSpec(**{"head": "simulated", "replicas": 0, **wrong})
    with pytest.raises(ValueError, match=f"replicas {spec.replicas}.*'sim'"):
        RDPOConfig().rewards({"sim": spec}).build_algo()


def test_missing_model_is_named(build):
    with pytest.raises(ModelError, match="no directory"):
        build("backbone.family=auto", "backbone.model=/nowhere/at/all")
    with pytest.raises(EpdRayError, match="modle"):
        build("rewards={clip: {head: clip, replicas: 0, options: {modle: shapes-clip}}}")


def test_no_room_is_said_in_time(small_ray):
    start = time.monotonic()
    with pytest.raises(PlacementError, match=r"CPU: 64.5 asked.*rollout actors: 1 x"):
        require_room({"rollout actors": [{"CPU": 64.0}], "learner": [{"CPU": 0.5}]}, timeout_s=1)
    assert time.monotonic() - start < 10
    require_room({"learner": [{"CPU": 0.5}]}, timeout_s=10)


def test_group_of_one_is_refused(small_ray):
    with pytest.raises(ValueError, match="at least 2"):
        RDPOConfig().rollouts(group_size=1).build_algo()


def test_a_minibatch_that_does_not_divide_the_images_is_refused():
    config = RDPOConfig().rollouts(prompts_per_iteration=8, group_size=4)
    said = r"minibatch_size is 24, which does not divide the 32 images of an iteration .*: set 16 or 32"
    with pytest.raises(ValueError, match=said):
        config.copy().training(minibatch_size=24).validate()
    config.training(minibatch_size=64).validate()  # all images in one step


@pytest.mark.parametrize(("minibatch", "epochs", "steps"), [(8, 3, 12), (64, 2, 2)])
def test_each_epoch_uses_each_image_once_and_no_global_randomness(build, monkeypatch, minibatch, epochs, steps):
    algo = build(f"rdpo.minibatch_size={minibatch}", f"rdpo.num_epochs={epochs}")
    algo.train()
    seen, loss = [], RDPOLearner.compute_loss_for_module

    def spied(self, *, batch, **given):
        seen.append([round(float(value), 9) for value in batch["action_logp"]])
        return loss(self, batch=batch, **given)

    monkeypatch.setattr(RDPOLearner, "compute_loss_for_module", spied)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    algo.train()
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert len(seen) == steps
    drawn, each = sorted(round(row["log_prob"], 9) for row in records(algo)), steps // epochs
    passes = [list(chain(*seen[i : i + each])) for i in range(0, steps, each)]
    assert all(sorted(one) == pytest.approx(drawn) for one in passes)
    assert len({tuple(one) for one in passes}) == epochs  # each in another order


def test_an_earlier_state_is_taken_whole(build):
    algo = build("rdpo.staleness=1")
    run(algo, 3)
    state, before, after = deepcopy(algo.export_state()), algo.checksum(), run(algo, 2)
    algo.import_state(state)
    assert algo.checksum() == before
    assert run(algo, 2) == after


def test_a_state_before_the_first_update_brings_its_table(build):
    """Stage 1 has replaced the table, and nothing was learned yet: as at an interrupt in the first iteration."""
    first, start = build(), uniform_table(3, 3, True)
    first.rebase(SolverTable(start.positions * 0.5, start.weights))
    state, again = first.export_state(), build()
    again.import_state(state)
    assert again.checksum() == first.checksum() != build().checksum()
    assert run(again, 2) == run(first, 2)


def test_an_iteration_is_proposed_once(build, monkeypatch):
    proposed = []

    def counted(plan, prompts, iteration):
        proposed.append(iteration)
        return propose(plan, prompts, iteration)

    monkeypatch.setattr("epd_ray.rdpo.ahead.propose", counted)
    algo = build("rdpo.staleness=1")
    run(algo, 3)
    assert proposed == [0, 1, 2, 3, 4] and list(algo._ahead.submitted) == [3, 4]
    state, other = algo.export_state(), build("rdpo.staleness=1", "seed=1")
    other.train()
    other.import_state(state)  # what it had ahead belongs to another past
    proposed.clear()
    other.train()
    assert proposed == [3, 4, 5] and other.last.rollouts[0].iteration == 4 and list(other._ahead.submitted) == [4, 5]


def test_baselines_run_on_the_same_actors(build):
    algo = build()
    for kind in ("euler", "heun", "dpm2", "ipndm"):
        sampled, images = drawn(algo, baseline(kind, 6), ["a", "b", "c"], [1, 2, 3])
        assert images.shape == (3, 3, 8, 8) and images.dtype == np.uint8
        assert sampled.reward.shape == (3,)


def test_scales_train_and_survive_a_checkpoint(build, tmp_path):
    scales = ("solver.start_point=false", "rdpo.scale_time=true")
    algo = build(*scales)
    run(algo, 3)
    table = algo.mean_table()
    assert table.scale_dir is not None and table.scale_time is not None
    assert float((table.scale_dir - 1).abs().max()) > 1e-4
    path = save_checkpoint(tmp_path, 3, algo.export_state(), keep=1)
    again = build(*scales)
    again.import_state(load_newest(path.parent))
    torch.testing.assert_close(again.mean_table().scale_dir, table.scale_dir)
    assert run(again, 1) == run(algo, 1)


def test_policy_options_reach_the_learner(build):
    small = "rdpo.lr=1e-4"  # steps of which some are clipped and some are not
    base = run(build(small), 2)
    for option in (
        "rdpo.kl_coeff=0.5",
        "rdpo.entropy_coeff=0.1",
        "rdpo.num_epochs=2",
        "rdpo.clip=0.01",
        "rdpo.lr=2e-4",
    ):
        assert run(build(small, option), 2) != base, option


def test_nothing_is_drawn_beyond_the_last_iteration(build):
    algo = build("rdpo.staleness=1")
    algo.stop_after(2)
    submitted = []
    for _ in range(3):  # the third is asked for all the same
        algo.train()
        submitted.append(algo.policy_version + len(algo._ahead.submitted))
    assert submitted == [2, 2, 3]


def hang(learner):
    """From its next update on."""
    learner.before_gradient_based_update = lambda **_: time.sleep(600)


@pytest.mark.slow
def test_a_learner_that_hangs_is_replaced_and_changes_nothing(build, caplog):
    calm, hit = build(), build("cluster.learner_actors=1")
    hit.train()
    hit.learner_group.foreach_learner(hang)
    hit._learner._timeout_s = 5.0
    assert run(hit, 1) == run(calm, 2)
    assert "the learner (its update) has not answered for 5 s: its process is ended" in caplog.messages


@pytest.mark.slow
def test_a_learner_that_always_hangs_ends_the_run(build, monkeypatch):
    algo = build("cluster.learner_actors=1")
    monkeypatch.setattr(lasting_learner, "ATTEMPTS", 2)
    rebuild = algo._learner._rebuild

    def hanging():
        group = rebuild()
        group.foreach_learner(hang)
        return group

    monkeypatch.setattr(algo._learner, "_rebuild", hanging)
    algo.learner_group.foreach_learner(hang)
    algo._learner._timeout_s = 2.0
    with pytest.raises(ModelError, match=r"learner.*no answer in time 2 times.*task_timeout_s"):
        algo.train()
