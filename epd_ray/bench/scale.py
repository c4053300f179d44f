"""How the system scales with rollout actors, and whether it stays as small as it began; on a simulated backbone."""

import statistics
import time
from collections.abc import Sequence

import psutil
import ray

from epd_ray.actors.cluster import ray_session
from epd_ray.actors.pipeline import RolloutPipeline
from epd_ray.actors.pool import Bounds, Pool
from epd_ray.actors.reward_pool import RewardPool
from epd_ray.actors.tasks import Task, TaskRunner, rollout_task
from epd_ray.config.loading import RunConfig, load_config
from epd_ray.policy.network import PolicyNetwork
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import algorithm, rdpo_config
from epd_ray.types import RolloutJob

SIMULATED = ("backbone.family=simulated", "rewards={sim: {head: simulated, num_cpus: 0.1}}", "distill.enabled=false")
PROMPTS = [f"prompt {i}" for i in range(64)]
BATCH_SECONDS = 2.0  # a batch of 8 images; a real one takes longer
DRIFT_CALLS = 4  # of a batch: 2 intervals, each with a first call and one for its K points
BATCHES = 2  # per rollout actor and iteration
Record = dict[str, float | int | str | bool | None]


def scale(runners: Sequence[int] = (1, 2, 4, 8, 16, 32), plain: Sequence[int] = (1, 64), iterations: int = 5) -> Record:
    """Images/s with more and more rollout actors, as a share of so many times what one does; weak scaling.

    `rllib/<n>` are whole training iterations; `plain/<n>` the same pipeline over plain actors, which take less memory,
    without a learner. `coordinator_ms` is the driver's CPU time per image, `actor_mib` the peak of one actor, shared
    libraries included.
    """
    record: Record = {"batch_s": BATCH_SECONDS}
    with ray_session(None):
        for count in runners:
            record |= _named(f"rllib/{count}", _training(count, iterations))
        for count in plain:
            record |= _named(f"plain/{count}", _plain(count, iterations))
    for kind, counts in (("rllib", runners), ("plain", plain)):
        for count in counts:
            one = float(record[f"{kind}/{counts[0]}/images_per_s"] or 0) / counts[0]
            record[f"{kind}/{count}/of_linear"] = float(record[f"{kind}/{count}/images_per_s"] or 0) / (one * count)
    return record


def _named(prefix: str, record: Record) -> Record:
    return {f"{prefix}/{name}": value for name, value in record.items()}


def _config(count: int) -> RunConfig:
    images = 8 * BATCHES * count
    return load_config(
        None,
        [
            *SIMULATED,
            f"backbone.options={{latency: {BATCH_SECONDS / DRIFT_CALLS}}}",
            f"cluster.rollout_actors={count}",
            "cluster.rollout_cpus=0.01",
            f"rdpo.prompts_per_iteration={images // 4}",
            f"rdpo.minibatch={images}",
        ],
    )


def _training(count: int, iterations: int) -> Record:
    with algorithm(_config(count), PROMPTS) as algo:
        algo.train()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(iterations):
            algo.train()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        images = iterations * algo.config.batch_plan.images
        return _measured(images, seconds, cpu, algo.memory()["rollout"].host)


def _plain(count: int, iterations: int) -> Record:
    config = rdpo_config(_config(count), PROMPTS)
    actor = ray.remote(TaskRunner).options(num_cpus=0.01)
    actors = [(i, actor.remote(config.worker_spec)) for i in range(count)]
    pool = Pool("plain actors", actors, lambda: actors[0], lambda a: a.ready.remote(), Bounds(count, count), 2)
    rewards = RewardPool(config.reward_specs, f"plain{count}")
    pipeline = RolloutPipeline(pool, rewards)
    try:
        ray.get([a.ready.remote() for a in pool.actors])
        rewards.wait_ready()
        pipeline.submit(_tasks(config, 0))
        start, cpu = time.perf_counter(), time.process_time()
        for iteration in range(iterations):
            pipeline.submit(_tasks(config, iteration + 1))
            pipeline.collect([task.task_id for task in _tasks(config, iteration)])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = pipeline.memory["rollout"].host
        return _measured(iterations * config.batch_plan.images, seconds, cpu, peak)
    finally:
        pipeline.stop()
        rewards.stop()


def _tasks(config: RDPOConfig, iteration: int) -> list[Task]:
    parameters = PolicyNetwork(config.policy_spec).parameters_array()
    batches = propose(config.batch_plan, PROMPTS, iteration)
    return [rollout_task(RolloutJob((iteration, i), 0, parameters, batch)) for i, batch in enumerate(batches)]


def _measured(images: int, seconds: float, cpu: float, peak: int) -> Record:
    return {
        "images_per_s": images / seconds,
        "of_latency": images / seconds * BATCH_SECONDS / 8,
        "coordinator_ms": 1e3 * cpu / images,
        "actor_mib": peak / 2**20,
    }


def flat(iterations: int = 1000, settle: int = 100) -> Record:
    """Memory over many iterations without latency: of the driver (resident) and of the object store (used).

    Samples every 10 iterations after `settle`; `_slope_kib` is the least-squares growth per iteration.
    """
    driver = psutil.Process()
    config = load_config(None, [*SIMULATED])
    samples = []
    with algorithm(config, PROMPTS) as algo:
        for i in range(1, iterations + 1):
            algo.train()
            if i >= settle and i % 10 == 0:
                samples.append((i, driver.memory_info().rss / 2**20, _store_mib()))
    steps, resident, store = (list(column) for column in zip(*samples, strict=True))
    return {
        "iterations": iterations,
        "images": iterations * config.rdpo.prompts_per_iteration * config.rdpo.group_size,
        **_trend("driver", steps, resident),
        **_trend("store", steps, store),
    }


def _store_mib() -> float:
    """Bytes in the object store, pinned and cached, in MiB."""
    total = ray.cluster_resources()["object_store_memory"]
    free = ray.available_resources().get("object_store_memory", 0.0)
    return float(total - free) / 2**20


def _trend(name: str, steps: Sequence[int], values: Sequence[float]) -> Record:
    fifth = max(1, len(values) // 5)
    return {
        f"{name}_first_mib": statistics.median(values[:fifth]),
        f"{name}_last_mib": statistics.median(values[-fifth:]),
        f"{name}_peak_mib": max(values),
        f"{name}_slope_kib": 1024 * statistics.linear_regression(steps, values).slope,
    }
