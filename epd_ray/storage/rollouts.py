"""The rollouts of a run as Parquet: one file an iteration, each rollout_id once.

Schema version 2, the columns of ROLLOUT_SCHEMA with `rewards` put in by `rollout_schema`. Version 1 had no positions,
weights, scales, seconds and image. The version stands in every file's metadata as schema_version, and what a column
means in its field's metadata as description.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from epd_ray.errors import RewardError
from epd_ray.storage.run_directory import unwritable, whole
from epd_ray.types import ImageArray

SCHEMA_VERSION = 2
NUMBERS = pa.list_(pa.float32())


def _field(name: str, kind: pa.DataType, description: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


ROLLOUT_SCHEMA = pa.schema(
    [
        _field("rollout_id", pa.string(), "hash of (run seed, iteration, index); unique in a run"),
        _field("group_id", pa.string(), "rollouts whose rewards are compared with each other"),
        _field("iteration", pa.int32(), "from 1"),
        _field("prompt", pa.string(), "what was drawn"),
        _field("noise_seed", pa.int64(), "seed of the initial latent"),
        _field("action_seed", pa.int64(), "seed of the table's draw"),
        _field("policy_version", pa.int32(), "learner updates behind the policy that drew the table"),
        _field("action", NUMBERS, "[N, A], row by row: segments (K+1), weights (K), trained scales (K each)"),
        _field("positions", NUMBERS, "[N, K], row by row, in [0, 1]: where the action's table looks in each interval"),
        _field("weights", NUMBERS, "[N, K], row by row, each row adds up to 1: how the table weighs what it saw"),
        _field("scale_dir", NUMBERS, "[N, K], row by row; null when no direction scales are trained", nullable=True),
        _field("scale_time", NUMBERS, "[N, K], row by row; null when no time scales are trained", nullable=True),
        _field("log_prob", pa.float64(), "of the action when it was drawn, summed over intervals"),
        _field("reward", pa.float32(), "the mix that was learned from"),
        _field("advantage", pa.float32(), "the reward against its group, normalised over the batch"),
        _field("generate_seconds", pa.float32(), "in the rollout actor, an equal share of its batch's"),
        _field("score_seconds", pa.float32(), "in the slowest head, an equal share of its batch's"),
        _field("image", pa.binary(), "PNG; null unless store.images is set", nullable=True),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)
"""The columns of every rollout file; `rollout_schema` adds the struct `rewards`, one field per head."""

TIMINGS = ("generate_seconds", "score_seconds")
"""The columns in which a run differs from its repetition."""


def rollout_schema(heads: Sequence[str]) -> pa.Schema:
    """ROLLOUT_SCHEMA with `rewards`, a struct of each head's raw score (`rewards.clip` in SQL, a dict in pandas)."""
    scores = pa.struct([pa.field(head, pa.float32(), nullable=False) for head in heads])
    return ROLLOUT_SCHEMA.insert(
        ROLLOUT_SCHEMA.get_field_index("reward"), _field("rewards", scores, "each head's raw score")
    )


def rollout_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One iteration's rollouts as an Arrow table.

    Args:
        rows: one mapping per rollout with every column of ROLLOUT_SCHEMA, and `rewards`: head -> raw score.
            `action` is [N, A] and the table's columns [N, K], or flat; `image` [3, H, W] uint8, or None.

    Raises:
        RewardError: a reward that is absent or not finite.
        ValueError: no rows, wrong columns, a rollout_id twice, or another number that is not finite.
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
    for head, value in [*rewards.items(), ("mix", row["reward"])]:
        if not math.isfinite(value):
            raise RewardError(head, f"{value} for prompt {row['prompt']!r}, expected a finite number", [rollout_id])
    for name in ("action", "positions", "weights", "log_prob", "advantage"):
        if not np.isfinite(row[name]).all():
            raise ValueError(f"rollout {rollout_id}: {name} is {row[name]}, expected finite numbers")


def write_rollouts(folder: Path, iteration: int, table: pa.Table) -> Path:
    """Write iteration-000001.parquet and the like, whole or not at all; an earlier try is replaced.

    Raises:
        ValueError: rows of another iteration.
        RunDirectoryError: the disk refuses.
    """
    if (found := table["iteration"].unique().to_pylist()) != [iteration]:
        raise ValueError(f"rows of iterations {found}, expected {iteration} alone")
    path = folder / f"iteration-{iteration:06d}.parquet"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with whole(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    return path


def drop_rollouts(folder: Path, after: int) -> None:
    """Remove the files of the iterations after one: a resumed run writes them again."""
    for path in folder.glob("iteration-*.parquet"):
        if int(path.stem.rpartition("-")[2]) > after:
            path.unlink()
