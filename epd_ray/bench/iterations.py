"""What the system adds to an iteration, and whether its stages overlap; on a simulated backbone."""

import statistics
import time

from epd_ray.bench.timing import timed
from epd_ray.config.loading import load_config
from epd_ray.rdpo.session import algorithm

SIMULATED = ("backbone.family=simulated", "rewards={sim: {head: simulated}}", "distill.enabled=false")
Record = dict[str, float | int | str | bool | None]


def overhead(iterations: int = 200) -> Record:
    """RLlib's and Ray's share of an iteration: a simulated backbone without latency, 2 rollout actors.

    The whole iteration counts as overhead except the workers' own time, which the actors measure themselves.
    """
    config = load_config(None, [*SIMULATED, "rdpo.staleness=0"])
    with algorithm(config, [f"prompt {i}" for i in range(64)]) as algo:
        totals, works = [], []
        for _ in range(iterations):
            start = time.perf_counter()
            algo.train()
            totals.append(time.perf_counter() - start)
            m = algo.last.metrics
            works.append(m["time/generate"] / config.cluster.rollout_actors + m["time/score"])
    total, work = statistics.median(totals), statistics.median(works)
    return {
        "iterations": iterations,
        "iteration_ms": 1e3 * total,
        "workers_ms": 1e3 * work,
        "overhead_ms": 1e3 * (total - work),
    }


def overlap(iterations: int = 12) -> Record:
    """Seconds per iteration with staleness 1 against 0, where generating and scoring take equally long.

    `of_longer_stage` is the overlapped iteration against the longer stage, as the actors measured it in the same run.
    """
    medians = {}
    stages: list[float] = []
    for staleness in (0, 1):
        # 4 jobs on 2 actors, 4 drift calls of 60 ms each: 0.48 s; one head scores 4 jobs in 0.12 s each: 0.48 s.
        latencies = ("backbone.options={latency: 0.06}", "rewards.sim.options={latency: 0.12}")
        config = load_config(None, [*SIMULATED, *latencies, f"rdpo.staleness={staleness}"])
        with algorithm(config, [f"prompt {i}" for i in range(64)]) as algo:
            seconds, stages = [], []
            for _ in range(iterations):
                seconds.append(timed(algo.train))
                m = algo.last.metrics
                stages.append(max(m["time/generate"] / config.cluster.rollout_actors, m["time/score"]))
        medians[staleness] = statistics.median(seconds[2:])
    return {
        "synchronous_s": medians[0],
        "overlapped_s": medians[1],
        "ratio": medians[1] / medians[0],
        "longer_stage_s": statistics.median(stages[2:]),
        "of_longer_stage": medians[1] / statistics.median(stages[2:]),
    }
