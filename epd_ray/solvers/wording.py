"""The parts of a table as text for people, one list of words for every place that shows a table."""

from torch import Tensor

from epd_ray.solvers.table import COLUMN_NAMES, INTERVAL_NAMES, SolverTable

PASS = "pass without the prompt"
MADE, LEFT_OUT = "made", "left out"


def columns_as_text(table: SolverTable, between: str = " ") -> dict[str, list[str]]:
    """Each part that a table has: its name for people, and a text for each of the N intervals.

    Args:
        table: [N, K].
        between: what stands between the values of an interval.
    """
    names = COLUMN_NAMES | INTERVAL_NAMES
    found = {
        names[name]: [_numbers(values[i], between) for i in range(table.intervals)]
        for name, values in (table.columns() | table.interval_columns()).items()
    }
    if table.reused:
        found[PASS] = [LEFT_OUT if i in table.reused else MADE for i in range(table.intervals)]
    return found


def _numbers(values: Tensor, between: str) -> str:
    return between.join(f"{value:.4f}" for value in values.reshape(-1).tolist())
