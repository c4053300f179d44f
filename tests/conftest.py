"""One small Ray per module, on loopback, ended afterwards."""

import os
import signal
from collections.abc import Iterator

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest

from epd_ray.config import load_config
from epd_ray.session import ray_session, rdpo_config

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, there by the children too

SIMULATED = [
    "backbone.family=simulated",
    "rewards={sim: {head: simulated}}",
    "distill.enabled=false",
    "solver.intervals=3",
    "cluster.rollout_actors=0",  # in the test's own process, which starts at once; tests of actors ask for them
    "cluster.learner_actors=0",
]


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    with ray_session(None):
        yield


@pytest.fixture
def build(small_ray):  # type: ignore[no-untyped-def]
    """Builds RDPO on the simulated backbone from overrides; stops what it built."""
    built = []

    def make(*overrides: str, table=None):  # type: ignore[no-untyped-def]
        config = load_config(None, [*SIMULATED, *overrides])
        algo = rdpo_config(config, [f"prompt {i}" for i in range(16)], table).build_algo()
        built.append(algo)
        return algo

    yield make
    for algo in built:
        algo.stop()
