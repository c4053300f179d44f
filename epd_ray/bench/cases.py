"""The cases of `epd-ray bench` by name, and the options that they take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd_ray.bench.batching import batching
from epd_ray.bench.distilling import distill
from epd_ray.bench.efficiency import efficiency
from epd_ray.bench.faults import faults
from epd_ray.bench.headroom import headroom
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
    "headroom": headroom,
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
HEADROOM = "headroom"
"""The case that takes the settings of a run, any model among them."""
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
        folder: folder in which the cases in SEEDED, and headroom, keep their measurements.
        config: a YAML file of a run's settings; for headroom.
        overrides: changes of these settings; for headroom.
        evals: numbers of evaluations; None means the usual ones; for headroom.
        reference: what the Frechet distance is measured to; for headroom.
        features: the network whose features it compares; for headroom.
    """

    model: str | None = None
    size: Size | None = None
    compile: bool | None = None
    seeds: int | None = None
    folder: Path = FOLDER
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    evals: tuple[int, ...] | None = None
    reference: Path | None = None
    features: str | None = None

    @property
    def of_headroom(self) -> dict[str, Any]:
        """What headroom takes, as far as it is given."""
        model = () if self.model is None else (f"backbone.model={self.model}",)
        given: dict[str, Any] = {"config": self.config, "overrides": (*model, *self.overrides), "evals": self.evals}
        given |= {"reference": self.reference, "features": self.features}
        return {name: value for name, value in given.items() if value}

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
    if case == HEADROOM:
        given = {"folder": options.folder, **options.of_headroom}
    elif case in SEEDED:
        given = {"folder": options.folder}
        if options.seeds is not None:
            given["seeds"] = range(options.seeds)
    elif case == "batching":
        given = {"subjects": options.subjects(RANDOM_MODELS)}
    elif case in OF_MODELS:
        (given["subject"],) = options.subjects((EMBEDDED,))
    return CASES[case](**given)
