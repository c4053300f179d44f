"""One small Ray per process, on loopback: modules share it, and it ends when one of them leaves something in it."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; those about it pretend, or start one
os.environ["OMP_NUM_THREADS"] = "1"  # several processes test at once; the actors compute with one thread anyway

import pytest
import ray
from matplotlib.figure import Figure
from ray.tune.utils.util import UtilMonitor

from epd_ray.actors.cluster import start_ray
from epd_ray.config.loading import load_config
from epd_ray.rdpo.session import rdpo_config
from epd_ray.runs.train import train
from tests.fakes import Quiet

UtilMonitor.__init__.__defaults__ = (True, 0.05)  # seconds between its looks, for which every algorithm's end waits
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, there by the children too

SETTLE_SECONDS = 5.0  # for actors that were told to end
SIMULATED = [
    "backbone.family=simulated",
    "rewards={sim: {head: simulated, replicas: 0}}",
    "distill.enabled=false",
    "solver.intervals=3",
    "cluster.rollout_actors=0",  # in the test's own process, which starts at once; tests of actors ask for them
    "cluster.learner_actors=0",
]

TINY = [
    "backbone.family=simulated",
    "rewards={sim: {head: simulated, replicas: 0, options: {target: 0.4}}}",
    "solver.intervals=3",
    "prompts.validation=8",
    "prompts.test=8",
    "prompts.num_train=16",
    "distill.prompts=8",
    "rdpo.iterations=6",
    "evaluation.every=2",
    "evaluation.tune=false",
    "checkpoint.every=2",
    "cluster.rollout_actors=0",
    "cluster.learner_actors=0",
]


@pytest.hookimpl(trylast=True)  # once others have taken out what is not asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with many long tests come first, so that the processes, which take one after the other, end together."""
    of_module: dict[Path, list[bool]] = {}
    for item in items:
        of_module.setdefault(item.path, []).append(is_long(item))
    items.sort(key=lambda item: (-sum(of_module[item.path]), -len(of_module[item.path])))


def is_long(item: pytest.Item) -> bool:
    """Whether a test is marked slow or uses Ray."""
    names = getattr(item, "fixturenames", ())
    return item.get_closest_marker("slow") is not None or "small_ray" in names or "no_ray" in names


@pytest.fixture(scope="session")
def _last() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def small_ray(_last: None) -> Iterator[None]:
    """The process's Ray, started unless it runs already."""
    _start()
    yield
    if _is_ours() and not _idle():
        ray.shutdown()


@pytest.fixture(scope="module")
def no_ray() -> Iterator[None]:
    """No Ray in this process: the module joins clusters, or starts Ray itself."""
    ray.shutdown()
    yield
    ray.shutdown()


_started: set[str] = set()  # addresses of what was started here


def _start() -> None:
    if not ray.is_initialized():
        start_ray()
        _started.add(ray.get_runtime_context().gcs_address)


def _is_ours() -> bool:
    """Whether a Ray runs that this file has started, and no cluster of a module's own."""
    return ray.is_initialized() and ray.get_runtime_context().gcs_address in _started


def _idle() -> bool:
    """Whether every CPU and GPU is free again, so that the next module finds what it would find alone."""
    whole, end = ray.cluster_resources(), time.monotonic() + SETTLE_SECONDS
    while any(ray.available_resources().get(name, 0) < whole.get(name, 0) for name in ("CPU", "GPU")):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="session")
def kept_run(_last: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run of TINY and its last words."""
    _start()
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train(load_config(None, TINY), out, Quiet())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a page stay empty: drawing them takes longer than a run of TINY. Those of kept_run are drawn."""

    def save(figure: Figure, file: Path | StringIO, **options: object) -> None:
        if isinstance(file, StringIO):
            file.write("<svg></svg>")
        else:
            file.touch()

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture
def finished(small_ray: None, kept_run: tuple[Path, list[str]]) -> tuple[Path, list[str]]:
    """The same run for all tests, which only read it; with Ray for what is done with it."""
    return kept_run


@pytest.fixture
def own_run(finished: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of it, for a test that changes it."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


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
