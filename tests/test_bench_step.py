"""The benches of steps, latency and throughput: that both sides of each ratio do the same work."""

import numpy as np
import pytest
import torch

from epd_ray.bench.flops import operations, tflop_per_eval
from epd_ray.bench.latency import _pipelines, latency
from epd_ray.bench.models import MODELS, Subject, prompts
from epd_ray.bench.plain_loop import STAGES, PlainLoop, one_after_another
from epd_ray.bench.step import step
from epd_ray.bench.throughput import throughput
from epd_ray.config.loading import load_config
from epd_ray.errors import ConfigError
from epd_ray.policy.network import PolicyNetwork
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.session import rdpo_config
from epd_ray.types import RolloutJob

SMALL = ["rdpo.prompts_per_iteration=2", "rdpo.group_size=2", "rdpo.minibatch_size=4", "cluster.images_per_job=2"]


def test_points_one_after_another_are_the_same_rows():
    calls = []

    def drift(x, sigma):
        calls.append(len(x))
        return x * sigma[:, None]

    x, sigma = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)
    assert torch.equal(one_after_another(drift, 2)(x, sigma), drift(x, sigma))
    assert calls == [2, 2, 2, 6]


def test_the_loop_draws_the_pictures_of_the_pipeline():
    chosen = prompts(4)
    config = rdpo_config(load_config(None, SMALL), chosen)
    worker = config.worker_spec.build()
    loop = PlainLoop(config, worker, chosen)
    parameters = PolicyNetwork(config.policy_spec).parameters_array()
    jobs = [RolloutJob((0, i), 0, parameters, batch) for i, batch in enumerate(propose(config.batch_plan, chosen, 0))]
    expected = np.concatenate([worker.generate(job).images for job in jobs])
    found = np.concatenate(loop.iterate(0, at_once=2))
    assert found.shape == expected.shape == (4, 3, 64, 64)
    assert np.abs(found.astype(int) - expected).mean() < 1  # batches of another size differ in bfloat16's last bits
    assert np.abs(found[[2, 3, 0, 1]].astype(int) - expected).mean() > 5
    assert min(loop.seconds.values()) > 0


TWO_HEADS = (
    "rewards={dark: {head: simulated, replicas: 0, options: {target: 0}}, light: {head: simulated, replicas: 0}}"
)


@pytest.mark.parametrize(
    "more",
    [
        ("rdpo.minibatch_size=8",),
        ("rdpo.minibatch_size=2", "rdpo.num_epochs=3"),
        ("rdpo.minibatch_size=4", "rdpo.kl_coeff=0.5"),
        ("rdpo.minibatch_size=4", "rdpo.entropy_coeff=0.05"),
        ("rdpo.lr_schedule=linear", "rdpo.iterations=3"),
        (TWO_HEADS, "rewards.light.weight=3"),
        (TWO_HEADS, "rdpo.normalisation=zscore"),
    ],
)
def test_the_loop_learns_what_the_pipeline_learns(build, more):
    algo = build("rdpo.staleness=0", "rdpo.prompts_per_iteration=2", *more)
    loop = PlainLoop(algo.config, algo.config.worker_spec.build(), algo.config.prompts)
    before = loop.network.parameters_array()
    for iteration in range(2):
        algo.train()
        loop.iterate(iteration, at_once=1)
    ours = algo.distribution().parameters.numpy()
    assert np.abs(ours - before).max() > 1e-3
    np.testing.assert_allclose(loop.network.parameters_array(), ours, atol=1e-5)


def test_step_names_every_figure():
    here = ["cluster.rollout_actors=0", "cluster.learner_actors=0", "rewards.clip.replicas=0"]
    record = step(overrides=[*SMALL, *here], rounds=1, iterations=1, threads=[1]).figures
    assert record["images"] == 4
    batched, single = (record[f"{kind}, threads 1/iteration_s"] for kind in ("batched", "single"))
    assert record["ratio"] == pytest.approx(batched / record["pipeline/iteration_s"])
    assert record["ratio_single"] == pytest.approx(single / record["pipeline/iteration_s"])
    parts = sum(record[f"batched, threads 1/{stage}_s"] for stage in STAGES)
    assert 0.8 < parts / batched < 1
    assert record["pipeline/generate_s"] > 0 and record["pipeline/cpu_s"] > 0
    worker = rdpo_config(load_config(None), prompts(4)).worker_spec.build()
    evals = 4 * (2 * 3) - 2  # 4 pictures, 3 points in each of 2 intervals; 2 groups share their start
    each = tflop_per_eval(worker.backbone, worker.guidance_scale)
    assert record["tflops"] == pytest.approx(evals * each / record["pipeline/iteration_s"])
    assert record["of_peak"] is None


@pytest.mark.slow
def test_latency_compares_at_one_parallel_nfe():
    subject = Subject("sd3-random", "small", 64)
    record = latency(subject, parallel_nfe=4, batch=2, repeats=3).figures
    assert record["solver/euler/vs_euler"] == 1
    for name in ("heun", "dpm2", "ipndm", "epd K=2", "epd K=3", "epd K=2, one after another"):
        assert record[f"solver/{name}/s"] > 0
    assert record["solver/epd K=3/vs_euler"] > 1
    assert record["pipeline/epd K=2/s"] > 0
    backbone, guidance = subject.open()
    for name, evals in (("euler", 4), ("heun", 4), ("epd K=2", 6), ("epd K=3, one after another", 8)):
        tflops = 2 * evals * tflop_per_eval(backbone, guidance) / record[f"solver/{name}/s"]
        assert record[f"solver/{name}/tflops"] == pytest.approx(tflops)
        assert record[f"solver/{name}/of_peak"] is None
        assert (record[f"solver/{name}/model_evals"], record[f"solver/{name}/network_passes"]) == (evals, 2 * evals)
    with pytest.raises(ConfigError, match="parallel_nfe is 5"):
        latency(subject, parallel_nfe=5)


@pytest.mark.parametrize("model", MODELS[1:])
def test_pipelines_run_with_their_points_on_two_devices(model):
    backbone, guidance = Subject(model, "small", 64).open()
    conditioning = backbone.encode(["a", "b"], guidance)
    theirs = backbone.pipeline.scheduler
    record = _pipelines(backbone, conditioning, 4, [["cpu", "cpu"]], 1)
    assert list(record)[::2] == [
        f"pipeline{more}/{name}/s" for more in ("", ", 2 devices") for name in ("euler", "epd K=2")
    ]
    assert backbone.pipeline.scheduler is theirs


@pytest.mark.slow
def test_throughput_replays_what_the_pictures_took():
    record = throughput(Subject("sd15-random", "small", 64), intervals=1, batch=4, repeats=3).figures
    assert record["images_per_s"] == pytest.approx(4 / record["stages/generate_s"])
    assert record["worker_of_bare"] == pytest.approx(record["stages/bare_s"] / record["stages/generate_s"])
    assert record["actor_of_bare"] > 0.2 and record["of_peak"] is None
    assert record["resolution"] == 64 and record["stages/encode_s"] > 0


def test_operations_are_those_of_the_matrix_products():
    linear = torch.nn.Linear(16, 32, bias=False)
    found = operations(lambda x, sigma: linear(x), torch.zeros(3, 16), torch.zeros(3))
    assert found == 2 * 3 * 16 * 32


def test_counting_leaves_compiled_code_compiled():
    ran = []
    weight = torch.zeros(16, 32)

    def backend(graph, _):
        return lambda *args: (ran.append(True), graph(*args))[1]

    @torch.compile(backend=backend)
    def network(x):
        return x @ weight

    for _ in range(2):
        network(torch.zeros(3, 16))
        assert operations(lambda x, sigma: network(x), torch.zeros(3, 16), torch.zeros(3)) == 2 * 3 * 16 * 32
    assert len(ran) == 2
