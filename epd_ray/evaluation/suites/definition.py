"""The suites: which samplers each compares, and what a paper says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from epd_ray.backbones.index import takes_prompts
from epd_ray.config.sections import AUTO, BackboneConfig
from epd_ray.drawing.sampler import Sampler, baseline
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.errors import ConfigError
from epd_ray.evaluation.comparison import REFERENCE, places
from epd_ray.evaluation.records import Tuned
from epd_ray.evaluation.suites.paper import FID_NFES, REWARD_TABLES, fid_table, reward_table
from epd_ray.evaluation.suites.settings import SuiteName
from epd_ray.evaluation.tuning import Place, TunedPlace
from epd_ray.solvers import Solver
from epd_ray.solvers.schedule_names import OWN
from epd_ray.solvers.zoo import find

FID_METRIC = "frechet_distance"
LEARNED, PLUGIN = "EPD-Solver", "EPD-Plugin"
METHODS = {"DDIM": "euler", "iPNDM(3M)": "ipndm3", "Heun": "heun", "DPM-Solver-2": "dpm2"}
"""Names of the methods in tables II to IV -> names here. The papers' code takes no last step to sigma 0, and so these
samplers do not either."""

FID_METHODS = {"DDIM": "euler@polynomial", "EDM": "heun@polynomial", "DPM-Solver-2": "dpm2@polynomial"}
FID_METHODS |= {"DPM-Solver++(3M)": "dpmpp3m@logsnr", "UniPC": "unipc3@logsnr", "iPNDM": "ipndm@polynomial"}
"""Names of the methods in the FID table -> names here, with the schedules of diff-sampler (arXiv 2312.00094), whose
values the table takes over. These samplers take no last step to sigma 0. A method with two evaluations an interval
reaches an odd number by an analytical first step. AMED and ParaDiGMS are not implemented here, and only the paper's
values of them are shown."""


@dataclass(frozen=True)
class Line:
    """A line of a suite's table, or a cell of the FID table.

    Attributes:
        method: the name of the method in the table.
        parallel_nfe: the length of the longest chain of evaluations that wait for each other.
        sampler: draws the line's pictures; None if the method is not implemented here.
        steps: the number of intervals; None in the FID table.
        schedule: the name of the sigma schedule; None for the method's own.
        published: metric -> the paper's value.
    """

    method: str
    parallel_nfe: int
    sampler: Sampler | None
    steps: int | None = None
    schedule: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """The samplers that a suite compares.

    Attributes:
        name: the suite's name.
        table: the name of the paper's table; None for a suite without one.
        lines: the lines in the order of the table.
        ours: the learned samplers.
        reference: the slow sampler that the headline compares the learned ones with; None for a suite without one.
        tuned: the key of a sampler that was tuned -> how it came to its settings.
    """

    name: SuiteName
    table: str | None
    lines: tuple[Line, ...]
    ours: tuple[Sampler, ...]
    reference: Sampler | None
    tuned: Mapping[str, Tuned] = field(default_factory=dict)

    @property
    def samplers(self) -> list[Sampler]:
        """All samplers, each once: the learned ones, the reference, then the others in the order of the table."""
        everyone = [*self.ours, *([self.reference] if self.reference else []), *(line.sampler for line in self.lines)]
        return list({sampler.key: sampler for sampler in everyone if sampler is not None}.values())


def require_fit(name: SuiteName, backbone: BackboneConfig) -> None:
    """Refuse a model that the suite is not for, before its weights are read.

    Raises:
        ConfigError: the model takes prompts and the suite needs one without, or the reverse; the message names the
            suite that fits.
        ModelError: there is no such model.
    """
    prompted = backbone.family != AUTO or takes_prompts(backbone.model, backbone.revision)
    if name == "paper-fid" and prompted:
        raise ConfigError(
            [f"model {backbone.model} takes prompts, --suite paper-fid is for unconditional ones: use --suite paper"]
        )
    if name != "paper-fid" and not prompted:
        raise ConfigError(
            [f"model {backbone.model} takes no prompts, but --suite {name} draws them: use --suite paper-fid"]
        )


def pick_table(facts: BackboneFacts) -> str:
    """The name of the paper's table about a model of this family and resolution.

    Raises:
        ConfigError: the paper has no such table.
    """
    about = {name: Solver.from_pretrained(preset).meta for name, preset in REWARD_TABLES.items()}
    resolution = facts.more.get("resolution")
    for name, meta in about.items():
        if (meta["backbone"], meta["resolution"]) == (facts.family, resolution):
            return name
    there = ", ".join(f"{name} ({meta['backbone']} at {meta['resolution']} px)" for name, meta in about.items())
    raise ConfigError(
        [f"the paper has no table for {facts.family} at {resolution} px: choose one with --table: {there}"]
    )


def paper_suite(table: str, ours: Sequence[Sampler]) -> Suite:
    """Make the suite of one of the tables II to IV; the reference is DDIM with the most steps.

    Args:
        table: the name of a table of REWARD_TABLES.
        ours: the learned samplers, which take the place of the table's last line. The paper's values stand beside
            those that have the parallel NFE of that line.
    """
    lines = []
    for row in reward_table(table):
        if row.method != LEARNED:
            sampler = baseline(f"{METHODS[row.method]}@{row.schedule}", row.parallel_nfe, final_zero=False)
            lines.append(Line(row.method, row.parallel_nfe, sampler, row.steps, row.schedule, row.values))
            continue
        for s in ours:
            same = s.parallel_nfe == row.parallel_nfe
            lines.append(Line(s.label, s.parallel_nfe, s, s.intervals, "its own", row.values if same else {}))
        if all(s.parallel_nfe != row.parallel_nfe for s in ours):
            lines.append(Line(row.method, row.parallel_nfe, None, row.steps, row.schedule, row.values))
    slow = max((line for line in lines if line.method == "DDIM"), key=lambda line: line.parallel_nfe)
    return Suite("paper", table, tuple(lines), tuple(ours), slow.sampler)


def fid_suite(table: str, ours: Sequence[Sampler]) -> Suite:
    """Make the suite of the FID table in the EPD-Solver paper, with the learned samplers in its last lines.

    Args:
        table: the name of a table of FID_TABLES.
        ours: the learned samplers; those with a multistep slope go to the line EPD-Plugin.

    Raises:
        ConfigError: the table has no column for a sampler's parallel NFE, or two samplers have the same place in it.
    """
    if beyond := [s for s in ours if s.parallel_nfe not in FID_NFES]:
        columns = ", ".join(map(str, FID_NFES))
        raise ConfigError(
            [f"{beyond[0].label} has parallel NFE {beyond[0].parallel_nfe}, the FID table has {columns}: distill "
             "one with solver.afs=true and solver.intervals=2, 3, 4 or 5"]
        )  # fmt: skip
    placed: dict[tuple[str, int], Sampler] = {}
    for s in ours:
        place = (PLUGIN if s.order > 1 else LEARNED, s.parallel_nfe)
        if placed.setdefault(place, s) is not s:
            raise ConfigError(
                [f"{placed[place].label} and {s.label} both have parallel NFE {s.parallel_nfe}, the FID table has room "
                 "for one: give each an --out of its own"]
            )  # fmt: skip
    lines = []
    for method, values in fid_table(table).items():
        for nfe, value in values.items():
            sampler = placed.get((method, nfe)) or _fid_baseline(method, nfe)
            lines.append(Line(method, nfe, sampler, published={FID_METRIC: value}))
    return Suite("paper-fid", table, tuple(lines), tuple(ours), None)


def comparison_suite(
    name: SuiteName, kinds: Sequence[str], ours: Sequence[Sampler], tuned: Sequence[TunedPlace] = ()
) -> Suite:
    """Make a suite that compares learned samplers with other methods at equal cost, and with 50 Euler steps.

    Args:
        name: "embedded" or "prompts".
        kinds: the names of the methods; each is drawn at the learned sampler's parallel NFE and at its evaluations.
        ours: the learned samplers, at least one.
        tuned: the places of `places_of` after tuning; each tuned sampler stands behind the one as it comes.
    """
    beside = {one.place.as_it_comes.key: one for one in tuned}
    slow = REFERENCE.as_it_comes
    found = list(ours)
    for place in places_of(kinds, ours):
        plain = place.as_it_comes
        found += [plain, *([beside[plain.key].sampler] if plain.key in beside else [])]
    distinct = {sampler.key: sampler for sampler in found}
    lines = [
        Line(s.label, s.parallel_nfe, s, s.intervals, None if s.schedule == OWN else s.schedule)
        for s in distinct.values()
    ]
    best = beside[slow.key].sampler if slow.key in beside else slow
    records = {one.sampler.key: one.found for one in tuned}
    return Suite(name, None, tuple(lines), tuple(ours), best, records)


def places_of(kinds: Sequence[str], ours: Sequence[Sampler]) -> list[Place]:
    """The places of all rivals of a comparison suite, each once; the last is that of the 50 Euler steps."""
    every = [place for s in ours for place in places(kinds, s, equal_evals=True)]
    slow = REFERENCE.as_it_comes.key
    distinct = {place.as_it_comes.key: place for place in every if place.as_it_comes.key != slow}
    return [*distinct.values(), REFERENCE]


def _fid_baseline(method: str, parallel_nfe: int) -> Sampler | None:
    """The sampler of a cell in the FID table; None if its method is not implemented here."""
    if method not in FID_METHODS:
        return None
    name = FID_METHODS[method]
    return baseline(name, parallel_nfe, final_zero=False, afs=find(name).evals > 1)
