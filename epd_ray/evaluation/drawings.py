"""The drawings of a comparison: each metric against what a picture costs, and the solvers' noise levels."""

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from epd_ray.evaluation.records import Evaluation, SolverRow
from epd_ray.evaluation.verdict import ordered
from epd_ray.evaluation.wording import named
from epd_ray.report.figures import Measured, cost_curve, publish, sigma_drawing
from epd_ray.solvers import Solver
from epd_ray.telemetry.progress import counted


def cost_curves(evaluation: Evaluation, folder: Path | None) -> dict[str, Markup]:
    """Draw each metric of which more is better against network passes, with evaluations and parallel NFE beside.

    Args:
        evaluation: the results.
        folder: receives cost_<metric>.png; None writes no files.

    Returns:
        The name of each metric for people -> its drawing as SVG.
    """
    ours = {row.label for key in evaluation.ours if (row := evaluation.solver(key))}
    found = {}
    for metric in evaluation.scores:
        methods: dict[str, list[Measured]] = {}
        for row in ordered(evaluation):
            if metric in row.metrics:
                value = row.metrics[metric]
                point = Measured(_costs(evaluation, row), value.mean, value.low, value.high)
                methods.setdefault(row.label, []).append(point)
        if methods:
            figure = cost_curve(methods, ours, named(metric))
            found[named(metric)] = publish(figure, f"cost_{metric.replace('/', '-')}", folder)
    return found


def _costs(evaluation: Evaluation, row: SolverRow) -> dict[str, int]:
    """A solver's costs by their name for people; passes come first, but only if they are known of all solvers."""
    passes = row.network_passes if evaluation.equal_cost == "network_passes" else None
    found = {} if passes is None else {"network passes": passes}
    return {**found, "evaluations": row.model_evals, "parallel NFE": row.parallel_nfe}


def noise_levels(evaluation: Evaluation, tables: Mapping[str, Solver], folder: Path) -> Markup | None:
    """Draw the noise levels of the solvers; None if no solver's are known.

    Args:
        evaluation: the results.
        tables: the keys of the learned solvers -> the solvers.
        folder: receives sigmas.png.
    """
    rows = {row.key: row for row in ordered(evaluation) if row.sigmas}
    if not rows:
        return None
    names = {key: _name(row) for key, row in rows.items()}
    figure = sigma_drawing(
        {names[key]: row.sigmas for key, row in rows.items()},
        {names[key]: solver for key, solver in tables.items() if key in names},
        {names[key] for key in evaluation.ours if key in names},
    )
    return publish(figure, "sigmas", folder)


def _name(row: SolverRow) -> str:
    return f"{row.label}, {counted(row.model_evals, 'evaluation')}"
