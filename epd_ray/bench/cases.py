"""The cases of `epd-ray bench` by name, and the options that they take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd_ray.bench.batching import batching
from epd_ray.bench.distilling import distill
from epd_ray.bench.efficiency import efficiency
from epd_ray.bench.faults import faults
from epd_ray.bench.iterations import overhead, overlap
from epd_ray.bench.kept import FOLDER
from epd_ray.bench.latency import latency
from epd_ray.bench.models import EMBEDDED, RANDOM_MODELS, Subject
from epd_ray.bench.random_models import Size
from epd_ray.bench.record import Record
from epd_ray.bench.scale import flat, scale
from epd_ray.bench.scoring import scoring
from epd_ray.bench.search import search
from epd_ray.bench.step import step
from epd_ray.bench.throughput import throughput

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
"""Cases that take seeds, and a folder in which they keep their measurements."""
OF_MODELS = ("batching", "latency", "step", "throughput")
"""Cases that take a model; batching takes several."""


@dataclass(frozen=True)
class Options:
    """Options of a command. A case ignores those that it does not take.

    Attributes:
        model: one of epd_ray.bench.models.MODELS; None means the embedded one, and every random one for batching.
        size: size of a random model; None means full on a GPU and small on a CPU.
        compile: whether the network of a random model is compiled; None means no.
        seeds: number of seeds, at least 1; None means the number that the case has by default.
        folder: folder in which the cases in SEEDED keep their measurements.
    """

    model: str | None = None
    size: Size | None = None
    compile: bool | None = None
    seeds: int | None = None
    folder: Path = FOLDER

    def subjects(self, models: Sequence[str]) -> list[Subject]:
        """The chosen model, or all of these where none is chosen.

        Raises:
            ConfigError: the model is unknown, or it does not take the size or the compilation.
        """
        chosen = models if self.model is None else (self.model,)
        return [Subject(model, self.size, compile=bool(self.compile)) for model in chosen]


def measured(case: str, options: Options) -> Record:
    """Measure one case, a key of CASES."""
    given: dict[str, Any] = {}
    if case in SEEDED:
        given = {"folder": options.folder}
        if options.seeds is not None:
            given["seeds"] = range(options.seeds)
    elif case == "batching":
        given = {"subjects": options.subjects(RANDOM_MODELS)}
    elif case in OF_MODELS:
        (given["subject"],) = options.subjects((EMBEDDED,))
    return CASES[case](**given)
