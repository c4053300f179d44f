"""Publishes a run's metrics as Ray metrics, which Prometheus collects and Grafana draws (telemetry/grafana)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from ray.util.metrics import Gauge

from epd_ray.telemetry.memory import Memory

REFRESH_SECONDS = 5.0


@dataclass(frozen=True)
class Export:
    """Publishes all values of a row whose keys match a pattern as one metric.

    Attributes:
        key: pattern of the keys in a row; each part in braces becomes a label of the metric.
        metric: name of the metric, before which Ray puts "ray_".
        description: text that Prometheus shows.
    """

    key: str
    metric: str
    description: str

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(re.findall(r"{(\w+)}", self.key))

    def match(self, key: str) -> dict[str, str] | None:
        """The labels that a row's key gives, by name; None if the key does not match the pattern."""
        found = re.fullmatch(re.sub(r"{(\w+)}", r"(?P<\1>.+)", self.key), key)
        return None if found is None else found.groupdict()


# The first pattern that matches a row's key applies; the last pattern matches every key.
EXPORTS = (
    Export("iteration", "epd_ray_iteration", "Number of learner updates so far"),
    Export("images", "epd_ray_images", "Number of pictures in the last iteration"),
    Export("images_per_second", "epd_ray_images_per_second", "Pictures per second over the last ten iterations"),
    Export("reward/mean", "epd_ray_reward_mixed", "Mean training reward, mixed from all heads"),
    Export("reward/group_std", "epd_ray_reward_group_std", "Standard deviation of the training reward within groups"),
    Export("reward/silent_groups", "epd_ray_silent_groups", "Number of groups whose pictures all have the same reward"),
    Export("reward/{head}", "epd_ray_reward", "Mean raw score of a head"),
    Export("reward_std/{head}", "epd_ray_reward_std", "Standard deviation of a head's raw scores"),
    Export("validation/{value}", "epd_ray_heldout_reward", "Reward, gain, interval and heads' scores in validation"),
    Export("alarm/{kind}", "epd_ray_alarm", "1 while the alarm is raised, else 0"),
    Export("losses/{name}", "epd_ray_loss", "Losses and statistics of the learner update"),
    Export("policy/{name}", "epd_ray_policy", "Distance of the policy from its start, entropy, concentration"),
    Export("time/{stage}", "epd_ray_seconds", "Seconds of a stage in the last iteration, summed over its actors"),
    Export("wait/{who}_for_{for}", "epd_ray_wait_seconds", "Idle seconds in the last iteration, summed over actors"),
    Export("queue/{stage}", "epd_ray_queue", "Number of tasks that wait, generate or score"),
    Export("actors/{kind}", "epd_ray_actors", "Number of actors that are alive"),
    Export("memory/{kind}/{device}", "epd_ray_memory_bytes", "Peak memory of one actor of a kind, on host or gpu"),
    Export("staleness", "epd_ray_staleness", "Updates between the policy that sampled and the policy that learns"),
    # These are gauges, too: a Ray Counter does not exist before its first event, which increase() would then miss.
    Export("retries", "epd_ray_retries_total", "Number of tasks that were run again"),
    Export("recoveries", "epd_ray_recoveries_total", "Number of actors that were restarted"),
    Export("{name}", "epd_ray_other", "Any other value of a row"),
)


def exported(row: Mapping[str, float]) -> Iterator[tuple[str, dict[str, str], float]]:
    """The metric, labels and value of each entry of a row."""
    for key, value in row.items():
        yield next((e.metric, labels, value) for e in EXPORTS if (labels := e.match(key)) is not None)


def memory_metrics(found: Mapping[str, Memory]) -> dict[str, float]:
    """The entries of a row for the actors' peak memory in bytes, from the result of `RDPO.memory`."""
    sizes = [(f"memory/{kind.replace(' ', '/')}", memory) for kind, memory in found.items()]
    hosts = {f"{key}/host": float(memory.host) for key, memory in sizes}
    return hosts | {f"{key}/gpu": float(m.device) for key, m in sizes if m.device is not None}


class Monitor:
    """Publishes the newest value of every key that a run's rows have had.

    Ray drops a gauge that is not set again within seconds, but an iteration may take minutes. A thread therefore sets
    all gauges every REFRESH_SECONDS until the run ends; the gauges of a run that died disappear.

    Args:
        run: name of the run, which becomes a label of all metrics.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = {e.metric: Gauge(e.metric, e.description, ("run", *e.labels)) for e in EXPORTS}
        self._newest: dict[str, float] = {}
        self._over = Event()
        self._thread = Thread(target=self._refresh, name="monitor", daemon=True)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()

    def write(self, row: Mapping[str, float]) -> None:
        """Publish a row; keys that it lacks keep their last values."""
        self._newest = {**self._newest, **row}
        self._publish()

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            self._publish()

    def _publish(self) -> None:
        for metric, labels, value in exported(self._newest):
            self._gauges[metric].set(float(value), {"run": self._run, **labels})
