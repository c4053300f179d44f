"""The time that RLlib and Ray add to an iteration, and how far its stages overlap, on a simulated backbone."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from epd_ray.bench.record import Record
from epd_ray.bench.settings import DEFAULTS, NO_STAGE_ONE, placeholders, simulated
from epd_ray.bench.timing import timed
from epd_ray.config.loading import load_config
from epd_ray.rdpo.session import algorithm

BATCH_SECONDS = 0.24  # of drawing a batch in `overlap`
SETTLING = 2  # iterations of `overlap` that are not counted


@dataclass(frozen=True)
class _Iteration:
    """Seconds of an iteration, and of drawing and scoring in it as the actors measured them, for each rollout actor."""

    total: float
    draw: float
    score: float


def overhead(iterations: int = 200) -> Record:
    """The share of an iteration that Ray, RLlib and the update take, with a backbone that costs nothing.

    `workers_ms` is the time that the default run's rollout actors and its reward actor measured for their own work, and
    `overhead_ms` the rest of the iteration. All are medians.

    Args:
        iterations: number of iterations, at least 1.
    """
    found = _iterations(["rdpo.staleness=0", *simulated()], iterations)
    total, work = median(i.total for i in found), median(i.draw + i.score for i in found)
    values = {"iteration_ms": 1e3 * total, "workers_ms": 1e3 * work, "overhead_ms": 1e3 * (total - work)}
    return Record("overhead", {"iterations": iterations}, values)


def overlap(iterations: int = 12) -> Record:
    """Median seconds of an iteration with staleness 1 and with staleness 0, where drawing takes as long as scoring.

    `ratio` is the overlapped iteration over the synchronous one. `of_longer_stage` is the overlapped iteration over the
    longer of its two stages, as the actors measured it in the same run; it cannot be less than 1.

    Args:
        iterations: number of iterations of each kind, more than 2, because the first 2 are not counted.
    """
    sleeping = simulated(BATCH_SECONDS, BATCH_SECONDS / DEFAULTS.cluster.rollout_actors)
    synchronous, overlapped = (
        _iterations([f"rdpo.staleness={staleness}", *sleeping], iterations)[SETTLING:] for staleness in (0, 1)
    )
    before, now = median(i.total for i in synchronous), median(i.total for i in overlapped)
    longer = median(max(i.draw, i.score) for i in overlapped)
    values = {
        "synchronous_s": before,
        "overlapped_s": now,
        "ratio": now / before,
        "longer_stage_s": longer,
        "of_longer_stage": now / longer,
    }
    return Record("overlap", {}, values)


def _iterations(overrides: Sequence[str], count: int) -> list[_Iteration]:
    config = load_config(None, [NO_STAGE_ONE, *overrides])
    found = []
    with algorithm(config, placeholders(64)) as algo:
        for _ in range(count):
            seconds = timed(algo.train).seconds
            spent = algo.last.metrics
            draw = spent["time/generate"] / config.cluster.rollout_actors
            found.append(_Iteration(seconds, draw, spent["time/score"]))
    return found
