"""The learned solvers of a suite: opening them, checking that they fit the model, and building the suite with them."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from epd_ray.backbones.index import FAMILIES, read_index
from epd_ray.backbones.pipeline import Family
from epd_ray.config.sections import AUTO, BackboneConfig
from epd_ray.drawing.sampler import Sampler, learned
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.errors import ConfigError
from epd_ray.evaluation.suites.definition import (
    LEARNED,
    Suite,
    comparison_suite,
    fid_suite,
    paper_suite,
    pick_table,
    places_of,
)
from epd_ray.evaluation.suites.paper import REWARD_TABLES
from epd_ray.evaluation.suites.settings import Request
from epd_ray.evaluation.tuning import Place, TunedPlace
from epd_ray.solvers import Solver, SolverTable, check_fit
from epd_ray.solvers.presets import PRESETS
from epd_ray.solvers.rival import require_rivals
from epd_ray.solvers.solver import FILE_NAME

log = logging.getLogger(__name__)
Sources = Mapping[str, str]
"""What `Solver.from_pretrained` takes (a directory, preset or hub id) -> a short name of the solver for people."""


def sources_of(names: Sequence[str], kept: Path) -> Sources:
    """List the solvers that are asked for, then those that the results have already.

    Args:
        names: directories, names of presets, or hub ids.
        kept: the folder that `keep_solvers` writes; it may be missing.

    Raises:
        TableError: a solver cannot be read.
    """
    asked = {_key(Solver.from_pretrained(name)) for name in names}
    earlier = [f.parent for f in sorted(kept.rglob(FILE_NAME)) if _key(Solver.from_pretrained(f)) not in asked]
    return {name: _short(name) for name in names} | {str(f): f.relative_to(kept).as_posix() for f in earlier}


def foresee(backbone: BackboneConfig) -> BackboneFacts | None:
    """Read what a pipeline's model_index.json tells of the model before its weights are read.

    Returns:
        The facts without sigmas; None for a family other than auto, or a pipeline class that no family drives.

    Raises:
        ModelError: there is no such model, or it is no diffusers pipeline.
    """
    if backbone.family != AUTO:
        return None
    name = read_index(backbone.model, backbone.revision).class_name
    if name not in FAMILIES.names():
        return None  # it is driven by its own call, and known only when it is open
    family = cast("type[Family]", FAMILIES.get(name))
    scale = family.default_guidance if backbone.guidance_scale is None else backbone.guidance_scale
    more: dict[str, JsonValue] = {"resolution": backbone.resolution}
    return BackboneFacts(family.name, backbone.model, family.form, (), scale, family.classifier_free, more)


def foresee_suite(request: Request, sources: Sources, rivals: Sequence[str], backbone: BackboneConfig) -> None:
    """Refuse a suite that the solvers' files and the model's index show to be impossible, before an actor starts.

    Args:
        request: which suite.
        sources: its learned solvers.
        rivals: the methods that these are compared with, in suites without a paper's table.
        backbone: the model that is opened later.

    Raises:
        ConfigError: the paper has no table for this model, or the table has no place for a solver.
        ModelError: there is no such model, or it is no diffusers pipeline.
        TableError: a solver cannot be read, or is for another kind of model.
    """
    facts = foresee(backbone)
    open_solvers(sources, facts)
    if facts is None:
        return
    if request.suite == "paper" and request.table is None and facts.more["resolution"] is None:
        _require_table(facts.family)
    else:
        build_suite(request, sources, rivals, facts)


def _require_table(family: str) -> None:
    """Refuse a family that none of the paper's tables is about at any resolution."""
    families = [str(Solver.from_pretrained(preset).meta["backbone"]) for preset in REWARD_TABLES.values()]
    if family not in families:
        there, tables = " and ".join(dict.fromkeys(families)), ", ".join(REWARD_TABLES)
        raise ConfigError([f"the paper has no table for {family}, only for {there}: choose one with --table: {tables}"])


def build_suite(
    request: Request,
    sources: Sources,
    rivals: Sequence[str],
    facts: BackboneFacts,
    tune: Callable[[Sequence[Place]], Sequence[TunedPlace]] = lambda places: (),
) -> Suite:
    """Build the suite that is asked for.

    Args:
        request: which suite.
        sources: its learned solvers; suite paper without any takes the published solver of the table.
        rivals: the methods that these are compared with, in suites without a paper's table.
        facts: what is known of the model.
        tune: tunes the rivals of a suite without a paper's table; without it they are as they come.

    Raises:
        ConfigError: the paper has no table for this model, the table has no place for a solver, or a rival is for
            another form of the ODE.
        TableError: a solver cannot be read, or is for another kind of model.
    """
    if request.suite == "paper":
        table = request.table or pick_table(facts)
        return paper_suite(table, open_solvers(or_published(sources, table), facts))
    ours = open_solvers(sources, facts)
    if request.suite == "paper-fid":
        assert request.table is not None
        return fid_suite(request.table, ours)
    require_rivals(rivals, facts.form)
    return comparison_suite(request.suite, rivals, ours, tune(places_of(rivals, ours)))


def or_published(sources: Sources, table: str | None) -> Sources:
    """The solvers themselves or, if there are none, the published solver of a paper's table."""
    return sources or {preset: preset for name, preset in REWARD_TABLES.items() if name == table}


def runs_of(sources: Sources) -> list[list[str]]:
    """The keys of the learned samplers in groups, each of runs that differ in nothing but their seed.

    Raises:
        TableError: a solver cannot be read.
    """
    found: dict[str, dict[str, str]] = {}
    for source in sources:
        solver = Solver.from_pretrained(source)
        run = solver.meta.get("run")
        if isinstance(run, dict):
            settings = json.dumps([run.get("settings"), solver.meta.get("stage")])
            found.setdefault(settings, {}).setdefault(json.dumps(run.get("seed")), _key(solver))
    return [list(dict.fromkeys(by_seed.values())) for by_seed in found.values()]


def open_solvers(sources: Sources, facts: BackboneFacts | None) -> list[Sampler]:
    """Open the learned samplers; two files with the same table make one sampler.

    Args:
        sources: the solvers.
        facts: what is known of the model that draws; None skips the check that they fit it.

    Raises:
        TableError: a solver cannot be read, or is for another kind of model.
    """
    found: dict[str, tuple[Solver, str]] = {}
    for source, name in sources.items():
        solver = Solver.from_pretrained(source)
        if facts is not None:
            _misfits(solver, source, facts)
        found.setdefault(_key(solver), (solver, name))
    alone = len(found) == 1
    return [learned(s, key, LEARNED if alone else f"{LEARNED} {name}") for key, (s, name) in found.items()]


def warn_of_misfits(sources: Sources, facts: BackboneFacts) -> None:
    """Log a warning for each solver that was made for other settings, such as another guidance scale."""
    for source in sources:
        for warning in _misfits(Solver.from_pretrained(source), source, facts):
            log.warning(warning)


def keep_solvers(sources: Sources, kept: Path) -> None:
    """Copy the solvers into the results, so that a later call that adds another solver still knows them.

    Args:
        sources: the solvers, whose pictures are all drawn.
        kept: the folder in the results' directory; it is made if it is missing.
    """
    there = {_key(Solver.from_pretrained(file)) for file in kept.rglob(FILE_NAME)}
    for source, name in sources.items():
        solver = Solver.from_pretrained(source)
        if (key := _key(solver)) not in there:
            place = kept / name
            solver.save_pretrained(kept / f"{name}-{key}" if (place / FILE_NAME).exists() else place)
            there.add(key)


def _misfits(solver: Solver, source: str, facts: BackboneFacts) -> list[str]:
    return check_fit(solver, source, facts.family, facts.form, facts.guidance_scale, facts.more)


def _key(solver: Solver) -> str:
    sampler = learned(solver, "", "")
    return f"epd-{sampler.parallel_nfe}-{digest(sampler)}"


def _short(name: str) -> str:
    """A solver's name for people: "mine" for runs/mine/solver, and presets and hub ids as they are."""
    if name in PRESETS or not Path(name).exists():
        return name
    path = Path(name).resolve()
    if path.name == "solver":
        return path.parent.name
    return f"{path.parent.name}/{path.name}" if path.name == "distilled" else path.name


def digest(sampler: Sampler) -> str:
    """A checksum of everything that decides what a sampler draws, which leaves out its key and label.

    What is at its default is left out too, so that a field that is added later changes no checksum.
    """
    values = {f.name: getattr(sampler, f.name) for f in fields(sampler) if f.name not in ("key", "label")}
    defaults = {f.name: f.default for f in fields(sampler)}
    about = {name: _plain(value) for name, value in values.items() if value is not defaults[name]}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def _plain(value: object) -> JsonValue:
    if isinstance(value, SolverTable):
        return list(value.to_lists().values())
    return list(value) if isinstance(value, tuple) else value  # type: ignore[return-value]  # numbers and names
