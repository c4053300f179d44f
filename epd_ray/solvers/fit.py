"""Checks whether a saved solver fits a model: a table is trained for one family, resolution and guidance scale."""

from collections.abc import Mapping

from pydantic import JsonValue

from epd_ray.errors import TableError
from epd_ray.solvers.solver import Solver
from epd_ray.types import Form


def check_fit(
    solver: Solver, name: str, family: str, form: Form, guidance_scale: float, facts: Mapping[str, JsonValue]
) -> list[str]:
    """Refuse a solver that was made for another kind of model, and warn of settings that differ from its training.

    Args:
        solver: with the meta of a run or a preset; a fact that its meta lacks is not checked.
        name: of the solver, for messages.
        family: the backbone's family.
        form: the form of the backbone's ODE, "ve" or "flow".
        guidance_scale: the guidance scale that pictures will be drawn with.
        facts: the backbone's facts, see `Backbone`; only the resolution is compared.

    Returns:
        Warnings, one line each, that name both values.

    Raises:
        TableError: the solver is for another family or another form of the ODE.
    """
    made_for = solver.meta.get("backbone", family)
    if made_for != family:
        raise TableError(
            f"solver {name} is for the backbone family {made_for}, the model is of the family {family}: "
            "its schedule does not fit (take a solver of the same family)"
        )
    if solver.form not in (None, form):
        raise TableError(f"solver {name} is for a model in {solver.form} form, the model is in {form} form")
    pairs = {
        "resolution": (solver.meta.get("resolution"), facts.get("resolution")),
        "guidance_scale": (solver.meta.get("guidance_scale"), guidance_scale),
    }
    return [
        f"solver {name} was trained at {what} {trained}, the pictures are made at {used}: expect less of it"
        for what, (trained, used) in pairs.items()
        if trained is not None and used is not None and trained != used
    ]
