"""The learned solvers of a suite, and the suite around them."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from epd_ray.backbones.auto import FAMILIES
from epd_ray.backbones.loading import read_index
from epd_ray.backbones.pipeline import Family
from epd_ray.config.sections import AUTO, BackboneConfig
from epd_ray.drawing.sampler import Sampler, learned
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.errors import ConfigError
from epd_ray.evaluation.suites.definition import LEARNED, Suite, comparison_suite, fid_suite, paper_suite, pick_table
from epd_ray.evaluation.suites.paper import REWARD_TABLES
from epd_ray.evaluation.suites.settings import Request
from epd_ray.solvers import Solver, SolverTable, check_fit
from epd_ray.solvers.presets import PRESETS
from epd_ray.solvers.solver import FILE_NAME
from epd_ray.solvers.zoo import require_form

log = logging.getLogger(__name__)
Sources = Mapping[str, str]
"""What `Solver.from_pretrained` takes -> a short name for people."""


def sources_of(names: Sequence[str], kept: Path) -> Sources:
    """The solvers that are asked for, and after them others that the results have already.

    Args:
        names: directories, presets or hub ids.
        kept: folder of `keep_solvers`, if it is there.

    Raises:
        TableError: a solver that cannot be read.
    """
    asked = {_key(Solver.from_pretrained(name)) for name in names}
    earlier = [f.parent for f in sorted(kept.rglob(FILE_NAME)) if _key(Solver.from_pretrained(f)) not in asked]
    return {name: _short(name) for name in names} | {str(f): f.relative_to(kept).as_posix() for f in earlier}


def foresee(backbone: BackboneConfig) -> BackboneFacts | None:
    """What a pipeline's index says of it before it is opened, without its sigmas; None for another kind of backbone.

    Raises:
        ModelError: no such model, or no pipeline.
    """
    if backbone.family != AUTO:
        return None
    name = read_index(backbone.model, backbone.revision).class_name
    if name not in FAMILIES.names():
        return None  # refused with the list of those that are, where it is opened
    family = cast("type[Family]", FAMILIES.get(name))
    scale = family.default_guidance if backbone.guidance_scale is None else backbone.guidance_scale
    return BackboneFacts(family.name, backbone.model, family.form, (), scale, {"resolution": backbone.resolution})


def foresee_suite(request: Request, sources: Sources, rivals: Sequence[str], backbone: BackboneConfig) -> None:
    """Refuse what the solvers' files and the model's index tell, before an actor starts.

    Args:
        request: which suite.
        sources: of its solvers.
        rivals: methods that ours are compared with, where no paper says which.
        backbone: that is opened later.

    Raises:
        ConfigError: no table for this model, or a solver that the suite has no place for.
        ModelError: no such model, or no pipeline.
        TableError: a solver that cannot be read, or that is for another kind of model.
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
    """Refuse a family that no table of the paper is about, whatever its resolution."""
    families = [str(Solver.from_pretrained(preset).meta["backbone"]) for preset in REWARD_TABLES.values()]
    if family not in families:
        there, tables = " and ".join(dict.fromkeys(families)), ", ".join(REWARD_TABLES)
        raise ConfigError(
            [f"the paper has no table for {family}, but for {there}: choose one with --table, of {tables}"]
        )


def build_suite(request: Request, sources: Sources, rivals: Sequence[str], facts: BackboneFacts) -> Suite:
    """The suite that is asked for, on a model.

    Args:
        request: which suite.
        sources: of its solvers; where a paper's table is asked for without any, the published one is taken.
        rivals: methods that ours are compared with, where no paper says which.
        facts: of the model.

    Raises:
        ConfigError: no table for this model, a solver that the suite has no place for, or a rival of another form.
        TableError: a solver that cannot be read, or that is for another kind of model.
    """
    if request.suite == "paper":
        table = request.table or pick_table(facts)
        return paper_suite(table, open_solvers(or_published(sources, table), facts))
    ours = open_solvers(sources, facts)
    if request.suite == "paper-fid":
        assert request.table is not None
        return fid_suite(request.table, ours)
    require_form(rivals, facts.form)
    return comparison_suite(request.suite, rivals, ours)


def or_published(sources: Sources, table: str | None) -> Sources:
    """The solvers of a suite; where there are none, the published one that a paper's table is about."""
    return sources or {preset: preset for name, preset in REWARD_TABLES.items() if name == table}


def open_solvers(sources: Sources, facts: BackboneFacts | None) -> list[Sampler]:
    """Learned samplers, each once, by what is in their files rather than by where these lie.

    Args:
        sources: of the solvers.
        facts: of the model that they are for; None: not known yet.

    Raises:
        TableError: a solver that cannot be read, or that is for another kind of model.
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
    """Log what solvers were made for, where the pictures are made otherwise."""
    for source in sources:
        for warning in _misfits(Solver.from_pretrained(source), source, facts):
            log.warning(warning)


def keep_solvers(sources: Sources, kept: Path) -> None:
    """Copy solvers whose pictures are all drawn, so that they stay in the results when others are added.

    Args:
        sources: of the solvers.
        kept: a folder, made where it is missing.
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
    """runs/mine/solver -> mine, others of a run with its name; presets and hub ids as they are."""
    if name in PRESETS or not Path(name).exists():
        return name
    path = Path(name).resolve()
    if path.name == "solver":
        return path.parent.name
    return f"{path.parent.name}/{path.name}" if path.name == "distilled" else path.name


def digest(sampler: Sampler) -> str:
    """Of all that decides what it draws, but not of how it is called."""
    about = {f.name: _plain(getattr(sampler, f.name)) for f in fields(sampler) if f.name not in ("key", "label")}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def _plain(value: object) -> JsonValue:
    if isinstance(value, SolverTable):
        parts = (value.positions, value.weights, value.scale_dir, value.scale_time)
        return [None if part is None else part.tolist() for part in parts]
    return list(value) if isinstance(value, tuple) else value  # type: ignore[return-value]  # numbers and names
