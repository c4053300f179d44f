"""What a run would take: the arithmetic by hand, and a measurement of parts whose times are known."""

import time

import pytest

from epd_ray.config.loading import load_config
from epd_ray.errors import PlacementError
from epd_ray.prompts.splits import load_prompts
from epd_ray.runs import dry_run as module
from epd_ray.runs.dry_run import dry_run
from epd_ray.runs.estimate import Costs, Estimate, estimate
from epd_ray.telemetry.memory import Memory
from tests.conftest import SIMULATED
from tests.fakes import Quiet

DRIFT, HEAD = 0.06, 0.15
PARTS = (
    f"backbone.options={{latency: {DRIFT}}}",
    f"rewards={{sim: {{head: simulated, replicas: 2, options: {{latency: {HEAD}}}}}, watched: {{head: simulated}}}}",
    "solver.start_point=false",
    "solver.points=1",  # a baseline's sequential depth and its evaluations are then in step with the drift's calls
    "rdpo.iterations=7",
    "evaluation.every=3",
    "prompts.validation=10",
    "prompts.test=16",
    "evaluation.baselines=[euler, heun, dpm2, ipndm]",
    "evaluation.tune=false",
)
BATCH = 3 * 2 * DRIFT  # N intervals of two calls


def config_of(*overrides: str):  # type: ignore[no-untyped-def]
    return load_config(None, [*SIMULATED, *PARTS, *overrides])


def estimated(config, **costs) -> Estimate:  # type: ignore[no-untyped-def]
    given = {"start": 5.0, "generate": 3.0, "score": {"sim": 2.0, "watched": 0.0}, "first": 9.0} | costs
    return estimate(config, load_prompts(config.prompts, 0), Costs(**given))


def test_the_arithmetic_by_hand():
    # 4 batches an iteration on 2 actors: 6 s of generation, 4 s of the head's two replicas; the stages overlap.
    found = estimated(config_of("cluster.rollout_actors=2"))
    assert found.stages["starting actors"] == 5 and found.stages["distilling"] == 0
    assert found.stages["fine-tuning"] == pytest.approx(7 * 6)
    assert found.busy == {"generation": 1, "reward sim": pytest.approx(4 / 6), "reward watched": 0}
    assert found.bottleneck == "generation"
    # 4 validations (0, 3, 6, 7) of 2 batches: 3 s of generation, 2 s of scoring.
    assert found.stages["validating"] == pytest.approx(4 * (3 + 2))
    # 2 batches each: ours twice, 4 baselines of the same 6 evaluations, and 50 Euler steps.
    assert found.stages["comparing"] == pytest.approx(6 * (3 + 2) + 50 / 6 * 3 + 2)
    assert found.total == pytest.approx(5 + 42 + 20 + 57)


def test_without_staleness_every_update_is_waited_for():
    found = estimated(config_of("cluster.rollout_actors=2", "rdpo.staleness=0"))
    assert found.stages["fine-tuning"] == pytest.approx(7 * (6 + 2))
    assert found.busy["generation"] == pytest.approx(6 / 8)


def test_many_actors_wait_for_the_update():
    found = estimated(config_of("cluster.rollout_actors=8"))
    assert found.stages["fine-tuning"] == pytest.approx(7 * max(4, (3 + 2 * 2) / 2))  # 2 replicas take 2 batches each
    slow = estimated(config_of("cluster.rollout_actors=8"), score={"sim": 12.0, "watched": 0.0})
    assert slow.bottleneck == "reward sim" and slow.stages["fine-tuning"] == pytest.approx(7 * 24)


def test_heads_in_the_driver_count_as_one():
    here = "rewards.sim.replicas=0"
    found = estimated(config_of("cluster.rollout_actors=2", here))
    assert found.busy == {"generation": pytest.approx(6 / 8), "reward sim": 1, "reward watched": 0}
    assert "reward sim" not in module._groups(config_of(here))
    used = {"rollout": Memory(1 << 30), "reward sim": Memory(1 << 30)}
    lines = module._memory(config_of(here), used)
    assert [line.split("  ")[1] for line in lines[2:]] == ["driver, drawing", "driver, reward sim"]
    assert module._single(config_of(here).rewards["sim"]).replicas == 0


def test_baselines_cost_their_evaluations():
    config = config_of("cluster.rollout_actors=1", "solver.points=3", "evaluation.baselines=[heun]")
    # Ours 12 evaluations; 50 Euler steps; heun with 6 at the same parallel NFE, and with 12.
    found = estimated(config, score={"sim": 0.0, "watched": 0.0})
    assert found.stages["comparing"] == pytest.approx(2 * (3 + 3 + 12.5 + 1.5 + 3))


def test_tuning_counts_its_pictures_and_the_rivals_twice():
    tuned = ("evaluation.tune=true", "evaluation.tune_images=32", "evaluation.baselines=[heun]")
    config = config_of("cluster.rollout_actors=1", "solver.points=3", *tuned)
    found = estimated(config, score={"sim": 0.0, "watched": 0.0})
    # Batches of 8: 4 for a rival and 2 for the reference; ours has 12 evaluations, the rivals 6 and 12.
    assert found.stages["tuning rivals"] == pytest.approx(4 * (1.5 + 3) + 2 * 12.5)
    assert found.stages["comparing"] == pytest.approx(2 * (3 + 3 + 12.5 + 2 * (1.5 + 3)))


def test_distilling_counts_teacher_grid_and_student():
    config = config_of("cluster.rollout_actors=1", "distill={enabled: true, prompts: 16, grid: 5, teacher_steps: 4}")
    evaluation = 3.0 / 6
    passes = 3 * (2 * 4 + 5 + 1) + 2 * 1
    assert estimated(config).stages["distilling"] == pytest.approx(2 * passes * evaluation)
    more = config_of("cluster.rollout_actors=1", "distill={prompts: 16, grid: 5, teacher_steps: 4, method: gradient}")
    assert estimated(more).stages["distilling"] > estimated(config).stages["distilling"]


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_the_estimate_is_what_training_takes(build, staleness):
    options = (*PARTS, f"rdpo.staleness={staleness}")
    config, algo = load_config(None, [*SIMULATED, *options]), build(*options)
    batch = algo.rehearse()[1]
    assert batch.generate_seconds == pytest.approx(BATCH, rel=0.3)
    assert batch.head_seconds["sim"] == pytest.approx(HEAD, rel=0.3)
    costs = Costs(0.0, batch.generate_seconds, batch.head_seconds, 0.0)
    promised = estimate(config, load_prompts(config.prompts, 0), costs).stages["fine-tuning"] / config.rdpo.iterations
    algo.train()
    start = time.perf_counter()
    algo.train(), algo.train()
    assert (time.perf_counter() - start) / 2 == pytest.approx(promised, rel=0.3)
    assert algo.policy_version == 3 and algo.checksum()


@pytest.mark.slow
def test_what_it_says(small_ray, monkeypatch):
    seen = []
    real = module.estimate
    monkeypatch.setattr(module, "estimate", lambda *given: seen.append(real(*given)) or seen[-1])
    monkeypatch.setattr(module, "ROOM_SECONDS", 0.5)
    observer = Quiet()
    lines = dry_run(config_of("cluster.rollout_actors=40", "cluster.rollout_cpus=0.5"), observer)
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert observer.stages == ["starting one actor of each kind", "measuring a batch"]
    assert "rollout actors 40 x 0.5 CPU" in text and "reward sim 2 x 0.25 CPU" in text
    assert "the actors do not fit the cluster: no room for the actors after" in text and "CPU: 20.75 asked" in text
    assert "training 224 7 iterations x 32" in text and "validation 40 4 times 10 prompts" in text
    assert "comparison 112 7 solvers x 16 prompts" in text and "all together 376" in text
    assert "rollout actor 40 " in text and "reward sim actor 2 " in text and " GiB" in text
    assert "the bottleneck is" in text or "the actors wait for updates" in text
    (found,) = seen
    # 4 batches on 40 actors: an iteration is as long as a batch takes through both stages, two of them being in flight.
    assert found.stages["fine-tuning"] == pytest.approx(7 * (BATCH + 2 * HEAD) / 2, rel=0.3)
    assert f"{found.total / 3600 * 20.75:.3g} core-hours" in text


def test_no_room_for_one_of_each_is_said(small_ray, monkeypatch):
    def refuse(*given):  # type: ignore[no-untyped-def]
        raise PlacementError("no room at all")

    monkeypatch.setattr(module, "_measure", refuse)
    with pytest.raises(PlacementError) as raised:
        dry_run(config_of(), Quiet())
    lines = str(raised.value).splitlines()
    assert lines[0] == "placement" and lines[-1].endswith("has no room either: no room at all")
    assert any(line.strip() == "all actors fit the cluster" for line in lines)
