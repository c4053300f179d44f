"""How drawing scales with rollout actors, and whether memory stays as small as it began, on a simulated backbone."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import psutil
import ray

from epd_ray.actors.cluster import ray_session
from epd_ray.actors.pipeline import RolloutPipeline
from epd_ray.actors.pool import Bounds, Pool
from epd_ray.actors.reward_pool import RewardPool
from epd_ray.actors.tasks import Task, TaskRunner, rollout_task
from epd_ray.bench.passes import jobs_of
from epd_ray.bench.record import Record, Value, under
from epd_ray.bench.settings import DEFAULTS, NO_STAGE_ONE, placeholders, simulated
from epd_ray.bench.timing import timed
from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import algorithm, rdpo_config

PROMPTS = placeholders(64)
BATCH_SECONDS = 2.0  # of drawing a batch, which takes a real model longer
BATCHES = 2  # for each rollout actor in an iteration


def scale(runners: Sequence[int] = (1, 2, 4, 8, 16, 32), plain: Sequence[int] = (1, 64), iterations: int = 5) -> Record:
    """Pictures per second with more and more rollout actors (weak scaling: the work grows with the actors).

    The rows `rllib/<n>` are training iterations with n rollout actors. The rows `plain/<n>` are the same pipeline over
    n plain actors, which take less memory, without a learner. `of_linear` is the rate over n times the rate of one
    actor, and `of_latency` the rate over that of an actor that does nothing but sleep. `coordinator_ms` is the CPU time
    of the driver for a picture, and `actor_mib` the peak memory of an actor, shared libraries included.

    Args:
        runners: numbers of rollout actors, of which the first is the base of `of_linear`.
        plain: numbers of plain actors, of which the first is the base of `of_linear`.
        iterations: number of counted iterations for each number of actors, at least 1.
    """
    values: dict[str, Value] = {}
    with ray_session(None):
        for kind, measure, counts in (("rllib", _training, runners), ("plain", _plain, plain)):
            found = {count: measure(count, iterations) for count in counts}
            one = found[counts[0]]["images_per_s"] / counts[0]
            for count, figures in found.items():
                linear = {"of_linear": figures["images_per_s"] / (one * count)}
                values |= under(f"{kind}/{count}", {**figures, **linear})
    return Record("scale", {"batch_s": BATCH_SECONDS}, values)


def _config(count: int) -> RunConfig:
    images = DEFAULTS.cluster.images_per_job * BATCHES * count
    return load_config(
        None,
        [
            NO_STAGE_ONE,
            *simulated(batch_s=BATCH_SECONDS),
            "rewards.sim.num_cpus=0.1",
            f"cluster.rollout_actors={count}",
            "cluster.rollout_cpus=0.01",
            f"rdpo.prompts_per_iteration={images // DEFAULTS.rdpo.group_size}",
            f"rdpo.minibatch_size={images}",
        ],
    )


def _training(count: int, iterations: int) -> dict[str, float]:
    with algorithm(_config(count), PROMPTS) as algo:

        def train() -> None:
            for _ in range(iterations):
                algo.train()

        algo.train()
        rates = _rates(train, iterations * algo.config.batch_plan.images)
        return {**rates, "actor_mib": algo.memory()["rollout"].host / 2**20}


def _plain(count: int, iterations: int) -> dict[str, float]:
    config = rdpo_config(_config(count), PROMPTS)
    actor = ray.remote(TaskRunner).options(num_cpus=0.01)
    actors = [(i, actor.remote(config.worker_spec)) for i in range(count)]
    pool = Pool("plain actors", actors, lambda: actors[0], lambda a: a.ready.remote(), Bounds(count, count), 2)
    rewards = RewardPool(config.reward_specs, f"plain{count}")
    pipeline = RolloutPipeline(pool, rewards)

    def draw() -> None:
        for iteration in range(iterations):
            pipeline.submit(_tasks(config, iteration + 1))
            pipeline.collect([task.task_id for task in _tasks(config, iteration)])

    try:
        ray.get([a.ready.remote() for a in pool.actors])
        rewards.wait_ready()
        pipeline.submit(_tasks(config, 0))
        rates = _rates(draw, iterations * config.batch_plan.images)
        return {**rates, "actor_mib": pipeline.memory["rollout"].host / 2**20}
    finally:
        pipeline.stop()
        rewards.stop()


def _tasks(config: RDPOConfig, iteration: int) -> list[Task]:
    return [rollout_task(job) for job in jobs_of(config, PROMPTS, iteration)]


def _rates(work: Callable[[], object], images: int) -> dict[str, float]:
    before = time.process_time()
    rate = images / timed(work).seconds
    return {
        "images_per_s": rate,
        "of_latency": rate * BATCH_SECONDS / DEFAULTS.cluster.images_per_job,
        "coordinator_ms": 1e3 * (time.process_time() - before) / images,
    }


def flat(iterations: int = 1000, settle: int = 100) -> Record:
    """Memory over many iterations without latency: of the driver (resident), and of the object store (in use).

    There is a sample every 10 iterations. `_first_mib` and `_last_mib` are the medians of the first and the last fifth
    of the samples, `_peak_mib` is their maximum, and `_slope_kib` their growth for each iteration by least squares.

    Args:
        iterations: number of iterations, at least 20 more than `settle`.
        settle: number of iterations before the first sample.
    """
    driver = psutil.Process()
    config = load_config(None, [NO_STAGE_ONE, *simulated()])
    samples = []
    with algorithm(config, PROMPTS) as algo:
        for i in range(1, iterations + 1):
            algo.train()
            if i >= settle and i % 10 == 0:
                samples.append((i, driver.memory_info().rss / 2**20, _store_mib()))
        images = iterations * algo.config.batch_plan.images
    steps, resident, store = (list(column) for column in zip(*samples, strict=True))
    values = {**_trend("driver", steps, resident), **_trend("store", steps, store)}
    return Record("flat", {"iterations": iterations, "images": images}, values)


def _store_mib() -> float:
    """What the object store holds, pinned and cached, in MiB."""
    total = ray.cluster_resources()["object_store_memory"]
    free = ray.available_resources().get("object_store_memory", 0.0)
    return float(total - free) / 2**20


def _trend(name: str, steps: Sequence[int], values: Sequence[float]) -> Mapping[str, float]:
    fifth = max(1, len(values) // 5)
    return {
        f"{name}_first_mib": statistics.median(values[:fifth]),
        f"{name}_last_mib": statistics.median(values[-fifth:]),
        f"{name}_peak_mib": max(values),
        f"{name}_slope_kib": 1024 * statistics.linear_regression(steps, values).slope,
    }
