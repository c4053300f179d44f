"""Measurements against something in the same run, as ratios of medians. Each case returns a record of figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from epd_ray.bench.batching import batching
from epd_ray.bench.distilling import distill
from epd_ray.bench.efficiency import efficiency
from epd_ray.bench.faults import faults
from epd_ray.bench.iterations import overhead, overlap
from epd_ray.bench.kept import FOLDER
from epd_ray.bench.latency import latency
from epd_ray.bench.random_models import Size
from epd_ray.bench.scale import flat, scale
from epd_ray.bench.scoring import scoring
from epd_ray.bench.search import search
from epd_ray.bench.step import step
from epd_ray.bench.throughput import throughput

Record = dict[str, Any]
"""Names of figures, some with slashes (see epd_ray.report.tables), to values."""

CASES: dict[str, Callable[..., Record]] = {
    "overhead": overhead,
    "overlap": overlap,
    "efficiency": efficiency,
    "search": search,
    "distill": distill,
    "batching": batching,
    "latency": latency,
    "step": step,
    "throughput": throughput,
    "scale": scale,
    "flat": flat,
    "faults": faults,
    "scoring": scoring,
}
SEEDED = ("efficiency", "search")
"""Cases that take seeds and a folder, where they keep what they have measured."""
OF_MODELS = ("batching", "latency", "step", "throughput")
"""Cases that take a model and its size."""


def measured(
    case: str,
    seeds: int | None = None,
    folder: Path = FOLDER,
    model: str | None = None,
    size: Size | None = None,
    compile: bool | None = None,
) -> Record:
    """A case's record.

    Args:
        case: a name in CASES.
        seeds: how many, for the cases in SEEDED; None: each one's own number.
        folder: where those keep what they have measured.
        model: for the cases in OF_MODELS, see epd_ray.bench.models; None: each one's own.
        size: see there.
        compile: see there.
    """
    given: dict[str, Any] = {}
    if case in SEEDED:
        given = {"folder": folder, "seeds": None if seeds is None else range(seeds)}
    elif case in OF_MODELS:
        given = {"model": model, "size": size, "compile": compile}
    return CASES[case](**{name: value for name, value in given.items() if value is not None})
