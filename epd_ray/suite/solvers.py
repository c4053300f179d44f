"""The learned solvers of a suite, and the suite around them."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from pydantic import JsonValue

from epd_ray.presets import PRESETS
from epd_ray.rollout import BackboneFacts
from epd_ray.sampling import Sampler, learned
from epd_ray.solvers import Solver, SolverTable, check_fit
from epd_ray.suite.definition import LEARNED, Suite, comparison_suite, fid_suite, paper_suite, pick_table
from epd_ray.suite.paper import REWARD_TABLES
from epd_ray.suite.settings import Request

log = logging.getLogger(__name__)


def build_suite(request: Request, rivals: Sequence[str], facts: BackboneFacts) -> Suite:
    """The suite that is asked for, on a model.

    Args:
        request: whose solvers are opened; where a paper's table is asked for without any, the published one.
        rivals: methods that ours are compared with, where no paper says which.
        facts: of the model.

    Raises:
        ConfigError: no table for this model, or a solver that the suite has no place for.
        TableError: a solver that cannot be read, or that is for another kind of model.
    """
    if request.suite == "paper":
        table = request.table or pick_table(facts)
        return paper_suite(table, open_solvers(request.solvers or (REWARD_TABLES[table],), facts))
    ours = open_solvers(request.solvers, facts)
    if request.suite == "paper-fid":
        assert request.table is not None
        return fid_suite(request.table, ours)
    return comparison_suite(request.suite, rivals, ours)


def open_solvers(names: Sequence[str], facts: BackboneFacts) -> list[Sampler]:
    """Learned samplers, each once, by what is in their files rather than by where these lie.

    Raises:
        TableError: a solver that cannot be read, or that is for another kind of model.
    """
    found: dict[str, Sampler] = {}
    for name in names:
        solver = Solver.from_pretrained(name)
        for warning in check_fit(solver, name, facts.family, facts.form, facts.guidance_scale, facts.more):
            log.warning(warning)
        label = LEARNED if len(names) == 1 else f"{LEARNED} {_short(name)}"
        sampler = learned(solver, "", label)
        key = f"epd-{sampler.parallel_nfe}-{digest(sampler)}"
        found.setdefault(key, learned(solver, key, label))
    return list(found.values())


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
