"""The reference's trained tables as solver files: the names that `Solver.from_pretrained` knows. No torch here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd_ray.solvers.costs import Cost, has_start_point, table_cost

NAMES = (
    "flux-rl",
    "sd15-distilled",
    "sd15-rl",
    "sd3-1024-distilled",
    "sd3-1024-rl",
    "sd3-512-distilled",
    "sd3-512-rl",
)

PRESETS = {name: Path(__file__).parent / f"{name}.json" for name in NAMES}


@dataclass(frozen=True)
class Preset:
    """What a list of presets shows of one.

    Attributes:
        intervals: N.
        points: K.
        cost: the evaluations that one picture takes.
        meta: what the solver was made for and from, as in `Solver`.
    """

    intervals: int
    points: int
    cost: Cost
    meta: dict[str, Any]


def read_preset(name: str) -> Preset:
    """The facts of a preset, read from its file without building the solver, which would import torch.

    Args:
        name: one of NAMES.
    """
    file = json.loads(PRESETS[name].read_text(encoding="utf-8"))
    first, time_scales = ([row[0] for row in file.get(column) or ()] for column in ("positions", "scale_time"))
    intervals, points = len(first), len(file["positions"][0])
    cost = table_cost(intervals, points, start_point=has_start_point(first, time_scales), afs=file["afs"])
    return Preset(intervals, points, cost, file["meta"])
