"""A run's metrics in Ray's own, which Prometheus collects and Grafana draws (telemetry/grafana)."""

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
    """Rows' values of one kind under one name.

    Attributes:
        key: of the values in a row; what stands in braces becomes a label.
        metric: its name, to which Ray adds "ray_".
        description: shown by Prometheus.
    """

    key: str
    metric: str
    description: str

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(re.findall(r"{(\w+)}", self.key))

    def match(self, key: str) -> dict[str, str] | None:
        """The labels of a row's key; None where it is of another kind."""
        found = re.fullmatch(re.sub(r"{(\w+)}", r"(?P<\1>.+)", self.key), key)
        return None if found is None else found.groupdict()


# The first that fits a row's key exports it; the last fits all.
EXPORTS = (
    Export("iteration", "epd_ray_iteration", "Policy version: updates so far"),
    Export("images", "epd_ray_images", "Pictures of the last iteration"),
    Export("images_per_second", "epd_ray_images_per_second", "Made, scored and learned from, over ten iterations"),
    Export("reward/mean", "epd_ray_reward_mixed", "Mean of the reward that is learned from"),
    Export("reward/group_std", "epd_ray_reward_group_std", "Spread of that reward inside a prompt's group"),
    Export("reward/silent_groups", "epd_ray_silent_groups", "Groups whose pictures all have the same reward"),
    Export("reward/{head}", "epd_ray_reward", "Mean raw score"),
    Export("reward_std/{head}", "epd_ray_reward_std", "Spread of the raw scores"),
    Export("validation/{value}", "epd_ray_heldout_reward", "On the validation prompts: reward, gain, interval, heads"),
    Export("alarm/{kind}", "epd_ray_alarm", "1 while it is raised"),
    Export("losses/{name}", "epd_ray_loss", "Of the learner"),
    Export("policy/{name}", "epd_ray_policy", "Distance to the start, entropy, concentration"),
    Export("time/{stage}", "epd_ray_seconds", "Of the last iteration; summed over the actors for what these do"),
    Export("wait/{who}_for_{for}", "epd_ray_wait_seconds", "Idle in the last iteration, summed over the actors"),
    Export("queue/{stage}", "epd_ray_queue", "Tasks waiting, generating, scoring"),
    Export("actors/{kind}", "epd_ray_actors", "Actors alive"),
    Export("memory/{kind}/{device}", "epd_ray_memory_bytes", "Peak of one actor of a kind, on host or gpu"),
    Export("staleness", "epd_ray_staleness", "Updates between the policy that drew and the one that learns"),
    # Gauges too: a Counter of Ray's cannot be there before its first event, which increase() would then miss.
    Export("retries", "epd_ray_retries_total", "Tasks that were run again"),
    Export("recoveries", "epd_ray_recoveries_total", "Actors that were brought back"),
    Export("{name}", "epd_ray_other", "What a row has besides"),
)


def exported(row: Mapping[str, float]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Metric, labels and value of everything in a row."""
    for key, value in row.items():
        yield next((e.metric, labels, value) for e in EXPORTS if (labels := e.match(key)) is not None)


def memory_metrics(found: Mapping[str, Memory]) -> dict[str, float]:
    """A row's entries for what `RDPO.memory` tells: bytes, of the GPU where there is one."""
    sizes = [(f"memory/{kind.replace(' ', '/')}", memory) for kind, memory in found.items()]
    hosts = {f"{key}/host": float(memory.host) for key, memory in sizes}
    return hosts | {f"{key}/gpu": float(m.device) for key, m in sizes if m.device is not None}


class Monitor:
    """Publishes the newest value of everything that a run's rows have had.

    Ray forgets a gauge that is not set again within seconds, so that the dead leave nothing behind; an iteration may
    take minutes. So a thread sets them until the run ends, and a run that died stops being shown.

    Args:
        run: the label that tells runs apart.
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
        """Take over a row; what it lacks keeps its last value."""
        self._newest = {**self._newest, **row}
        self._publish()

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            self._publish()

    def _publish(self) -> None:
        for metric, labels, value in exported(self._newest):
            self._gauges[metric].set(float(value), {"run": self._run, **labels})
