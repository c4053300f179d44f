"""The list of the presets that ship with the package: what `epd-ray tables list` prints, without importing torch."""

import json
from typing import Any

from rich.table import Table

from epd_ray.solvers.presets import NAMES, read_preset


def list_presets() -> Table:
    """What comes with the package, one row each."""
    table = Table("name", "backbone", "N", "K", "parallel NFE", "evals", "passes", "resolution", "guidance", box=None)
    table.pad_edge, table.collapse_padding = False, True  # so that 80 columns are enough
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for name in NAMES:
        preset = read_preset(name)
        cost = preset.cost
        costs = (cost.parallel_nfe, cost.model_evals, cost.passes_by(preset.meta))
        meta = [as_text(preset.meta.get(key)) for key in ("backbone", "resolution", "guidance_scale")]
        table.add_row(name, meta[0], *map(as_text, (preset.intervals, preset.points, *costs)), *meta[1:])
    return table


def as_text(value: Any) -> str:
    """A value of a solver's meta for people: JSON, but text without its quotes, and "unknown" for null."""
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
