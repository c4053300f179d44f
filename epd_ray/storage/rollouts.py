"""Stores a run's rollouts in Parquet: one file per iteration, one row per rollout.

Every file's metadata holds schema_version, and each column's metadata a description. Version 3 has the columns of
ROLLOUT_SCHEMA and the column `rewards` that `rollout_schema` adds. Version 2 lacked grid, history and guidance, and
version 1 also positions, weights, scales, seconds and image.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from epd_ray.errors import RewardError, RunDirectoryError, shown
from epd_ray.storage.parquet import read_table, write_table
from epd_ray.storage.run_directory import ROLLOUT_SUFFIX, numbered
from epd_ray.types import ImageArray

SCHEMA_VERSION = 3
FIX = "move it away, or put it back from a copy"
NUMBERS = pa.list_(pa.float32())


def _field(name: str, kind: pa.DataType, description: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


ROLLOUT_SCHEMA = pa.schema(
    [
        _field("rollout_id", pa.string(), "hash of (run seed, iteration, index); unique in a run"),
        _field("group_id", pa.string(), "equal for rollouts whose rewards are compared with each other"),
        _field("iteration", pa.int32(), "number of the iteration, from 1"),
        _field("prompt", pa.string(), "text that the model was given"),
        _field("noise_seed", pa.int64(), "seed of the initial noise"),
        _field("action_seed", pa.int64(), "seed with which the solver table was sampled from the policy"),
        _field("policy_version", pa.int32(), "number of learner updates of the policy that sampled the table"),
        _field("action", NUMBERS, "[N, A], row by row: segments, weights, and the trained parts"),
        _field("positions", NUMBERS, "[N, K], row by row: positions of the points in each interval, in [0, 1]"),
        _field("weights", NUMBERS, "[N, K], row by row: weights of the points; each row sums to 1"),
        _field("scale_dir", NUMBERS, "[N, K], row by row; null when no direction scales are trained", nullable=True),
        _field("scale_time", NUMBERS, "[N, K], row by row; null when no time scales are trained", nullable=True),
        _field("grid", NUMBERS, "[N]: shares of the schedule; null when the grid is not trained", nullable=True),
        _field("history", NUMBERS, "[N, H], row by row; null when no history is trained", nullable=True),
        _field("guidance", NUMBERS, "[N]: guidance scales; null when guidance is not trained", nullable=True),
        _field("log_prob", pa.float64(), "log probability of the action when sampled, summed over intervals"),
        _field("reward", pa.float32(), "reward that the learner used, mixed from all heads"),
        _field("advantage", pa.float32(), "reward relative to its group, normalised over the batch"),
        _field("generate_seconds", pa.float32(), "equal share of the batch's seconds in the rollout actor"),
        _field("score_seconds", pa.float32(), "equal share of the batch's seconds in the slowest head"),
        _field("image", pa.binary(), "PNG file; null unless store.images is set", nullable=True),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""The columns of every rollout file; `rollout_schema` adds the struct `rewards`, one field per head."""

TIMINGS = ("generate_seconds", "score_seconds")
"""The columns in which two runs with the same configuration differ."""


def rollout_schema(heads: Sequence[str]) -> pa.Schema:
    """ROLLOUT_SCHEMA with the column `rewards`, a struct of each head's raw score (`rewards.clip` in SQL)."""
    scores = pa.struct([pa.field(head, pa.float32()) for head in heads])
    said = "each head's raw score; null where the head does not judge the prompt"
    return ROLLOUT_SCHEMA.insert(ROLLOUT_SCHEMA.get_field_index("reward"), _field("rewards", scores, said))


def rollout_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One iteration's rollouts as an Arrow table.

    Args:
        rows: one mapping per rollout with every column of ROLLOUT_SCHEMA, and `rewards`, which maps heads to raw
            scores, or None where a head does not judge the prompt. `action` is [N, A] and the table's columns are
            [N, K], or flat; `image` is [3, H, W] uint8, or None.

    Raises:
        RewardError: a reward is missing or not finite, or a head has scores for some rollouts of a prompt alone.
        ValueError: there are no rows, a column is missing or unknown, a rollout_id occurs twice, or another number is
            not finite.
    """
    if not rows:
        raise ValueError("no rollouts, expected at least 1")
    heads = list(rows[0]["rewards"])
    schema = rollout_schema(heads)
    seen: set[str] = set()
    for row in rows:
        if wrong := set(schema.names) ^ set(row):
            raise ValueError(f"rollout {row.get('rollout_id')}: columns {sorted(wrong)} missing or unknown")
        if row["rollout_id"] in seen:
            raise ValueError(f"rollout {row['rollout_id']} appears twice")
        seen.add(row["rollout_id"])
        _check_numbers(row, heads)
    _check_nulls(rows, heads)
    return pa.Table.from_pylist([_as_cells(row, schema) for row in rows], schema=schema)


def _as_cells(row: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    lists = {
        field.name: np.asarray(row[field.name], np.float32).ravel()
        for field in schema
        if field.type == NUMBERS and row[field.name] is not None
    }
    return {**row, **lists, "image": None if row["image"] is None else _png(row["image"])}


def _png(image: ImageArray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _check_numbers(row: Mapping[str, Any], heads: Sequence[str]) -> None:
    rollout_id, rewards = row["rollout_id"], row["rewards"]
    if wrong := set(heads) ^ set(rewards):
        raise RewardError(min(wrong), "scored some rollouts of the batch, but not all", [rollout_id])
    if all(value is None for value in rewards.values()):
        raise RewardError("mix", f"no head judges the prompt {shown(row['prompt'])}", [rollout_id])
    given = [(head, value) for head, value in rewards.items() if value is not None]
    for head, value in [*given, ("mix", row["reward"])]:
        if value is None or not math.isfinite(value):
            raise RewardError(
                head, f"{value} for prompt {shown(row['prompt'])}, expected a finite number", [rollout_id]
            )
    lists = [field.name for field in ROLLOUT_SCHEMA if field.type == NUMBERS and row[field.name] is not None]
    for name in (*lists, "log_prob", "advantage"):
        if not np.isfinite(row[name]).all():
            raise ValueError(f"rollout {rollout_id}: {name} is {row[name]}, expected finite numbers")


def _check_nulls(rows: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> None:
    """A head judges a prompt or it does not: it scored all rollouts of the prompt, or none."""
    for head in heads:
        judged = {row["prompt"] for row in rows if row["rewards"][head] is not None}
        lost = [row for row in rows if row["rewards"][head] is None and row["prompt"] in judged]
        if lost:
            problem = f"judges the prompt {shown(lost[0]['prompt'])}, but has no score of some of its rollouts"
            raise RewardError(head, problem, [row["rollout_id"] for row in lost])


def write_rollouts(folder: Path, iteration: int, table: pa.Table) -> Path:
    """Write a file such as iteration-000001.parquet, completely or not at all; an earlier file is replaced.

    Args:
        folder: folder of the run's rollouts, created if it is missing.
        iteration: number of the iteration.
        table: result of `rollout_table`.

    Raises:
        ValueError: the table holds rows of another iteration.
        RunDirectoryError: the file cannot be written.
    """
    if (found := table["iteration"].unique().to_pylist()) != [iteration]:
        raise ValueError(f"rows of iterations {found}, expected {iteration} alone")
    path = folder / f"iteration-{iteration:06d}{ROLLOUT_SUFFIX}"
    write_table(path, table)
    return path


def read_rollouts(path: Path, pictures: bool = True) -> pa.Table:
    """The rollouts of one iteration, whose pages are checked against their checksums.

    Args:
        path: the file.
        pictures: whether to read the column `image` too, which may be most of the file.

    Raises:
        RunDirectoryError: the file is missing or damaged, or holds no rollouts of one iteration.
    """
    names = [name for name in ROLLOUT_SCHEMA.names if pictures or name != "image"]
    table = read_table(path, FIX, [*names, "rewards"], ROLLOUT_SCHEMA)
    if not pa.types.is_struct(table.schema.field("rewards").type):
        raise RunDirectoryError(f"{path} holds no rollouts: its column 'rewards' is not as expected ({FIX})")
    if len(table["iteration"].unique()) != 1:
        raise RunDirectoryError(f"{path} holds no rollouts of one iteration: it has {table.num_rows} rows")
    return table


def drop_rollouts(folder: Path, after: int) -> None:
    """Remove the files of all iterations after `after`, which a resumed run writes again."""
    for iteration, path in numbered(folder, ROLLOUT_SUFFIX).items():
        if iteration > after:
            path.unlink()
