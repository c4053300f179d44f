"""Whether a saved solver may drive a model: a table belongs to its family, schedule, resolution and guidance."""

from collections.abc import Mapping

from pydantic import JsonValue

from epd_ray.errors import TableError
from epd_ray.solvers.solver import Solver
from epd_ray.types import Form


def check_fit(
    solver: Solver, name: str, family: str, form: Form, guidance_scale: float, facts: Mapping[str, JsonValue]
) -> list[str]:
    """Refuse a solver made for another kind of model, and say where it was made for other settings.

    Args:
        solver: with the meta of a run or a preset; what it does not say is not checked.
        name: of the solver, for messages.
        family: of the backbone.
        form: of its ODE.
        guidance_scale: that pictures will be made with.
        facts: of the backbone; its resolution counts.

    Returns:
        Warnings, one line each, that name both values.

    Raises:
        TableError: another family, or another form of the ODE.
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
