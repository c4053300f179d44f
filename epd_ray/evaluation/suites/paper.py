"""The papers' values: tables II to IV of RDPO (arXiv 2512.22796), the FID table of EPD-Solver (arXiv 2507.14797)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from epd_ray.errors import ConfigError, shown
from epd_ray.registry import did_you_mean

FILE = Path(__file__).parent / "paper_tables.json"
REWARD_TABLES = {"sd15_512": "sd15-rl", "sd3_512": "sd3-512-rl", "sd3_1024": "sd3-1024-rl"}
"""Name of a table -> the published solver in its last line, whose file says which model the table is about."""

FID = "fid_first_paper"
FID_NFES = (3, 5, 7, 9)
FID_TABLES = ("cifar10_32", "imagenet_64", "ffhq_64", "lsun_bedroom_256")
TITLES = {"hpsv2.1": "HPSv2.1", "pickscore": "PickScore", "imagereward": "ImageReward", "clip": "CLIP"}
TITLES |= {"aesthetic": "Aesthetic"}
"""Registry name of a reward head -> the title of its column in the paper."""


@dataclass(frozen=True)
class RewardLine:
    """A line of tables II to IV.

    Attributes:
        method: the paper's name of the solver.
        steps: the number of the solver's intervals.
        schedule: the sigma schedule, "uniform", "polynomial", "logsnr" or "shift".
        parallel_nfe: the length of the longest chain of evaluations that wait for each other.
        values: registry name of a reward head -> mean raw score.
    """

    method: str
    steps: int
    schedule: str
    parallel_nfe: int
    values: Mapping[str, float]


@cache
def _tables() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def reward_table(name: str) -> tuple[RewardLine, ...]:
    """The lines of a table of REWARD_TABLES.

    Raises:
        ConfigError: there is no table of this name.
    """
    _known(name, tuple(REWARD_TABLES))
    columns = _tables()["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in _tables()[name]]
    return tuple(
        RewardLine(row["method"], row["steps"], row["schedule"], row["nfe"], {head: row[head] for head in TITLES})
        for row in rows
    )


def fid_table(name: str) -> dict[str, dict[int, float]]:
    """The FID by method and parallel NFE, in a table of FID_TABLES.

    Raises:
        ConfigError: there is no table of this name.
    """
    _known(name, FID_TABLES)
    methods, rows = _tables()[FID]["methods"], _tables()[FID][name]
    return {m: dict(zip(FID_NFES, row, strict=True)) for m, row in zip(methods, rows, strict=True)}


def _known(name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ConfigError(
            [f"unknown table {shown(name)}{did_you_mean(name, names)} (--table takes {', '.join(names)})"]
        )
