"""What a run keeps on disk: prompts in; configuration, rollouts and metrics out."""

import json
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tensorboardX import SummaryWriter

from epd_ray.errors import RewardError, RunDirectoryError

log = logging.getLogger(__name__)

PACKAGES = ("ray", "torch", "diffusers", "transformers", "numpy", "epd_ray")

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False, metadata={"description": description})
        for name, kind, description in [
            ("rollout_id", pa.string(), "hash of (run seed, iteration, index); unique in a run"),
            ("group_id", pa.string(), "rollouts whose rewards are compared with each other"),
            ("iteration", pa.int32(), "from 1"),
            ("prompt", pa.string(), "what was drawn"),
            ("noise_seed", pa.int64(), "seed of the initial latent"),
            ("action_seed", pa.int64(), "seed of the table's draw"),
            ("policy_version", pa.int32(), "learner updates behind the policy that drew the table"),
            (
                "action",
                pa.list_(pa.float32()),
                "[N, A], row by row: segments (K+1), weights (K), trained scales (K each)",
            ),
            ("log_prob", pa.float64(), "of the action when it was drawn, summed over intervals"),
            ("reward", pa.float32(), "the mix that was learned from"),
            ("advantage", pa.float32(), "the reward against its group, normalised over the batch"),
        ]
    ],
    metadata={"schema_version": "1"},
)
"""The columns of every rollout file; `rollout_schema` adds the struct `rewards`, one field per head."""


def rollout_schema(heads: Sequence[str]) -> pa.Schema:
    """ROLLOUT_SCHEMA with `rewards`, a struct of each head's raw score (`rewards.clip` in SQL, a dict in pandas)."""
    scores = pa.struct([pa.field(head, pa.float32(), nullable=False) for head in heads])
    described = pa.field("rewards", scores, nullable=False, metadata={"description": "each head's raw score"})
    return ROLLOUT_SCHEMA.insert(ROLLOUT_SCHEMA.get_field_index("reward"), described)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def package_versions() -> dict[str, str]:
    """Python's version and that of every package that can change a result."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass(frozen=True)
class RunDirectory:
    """Where each part of a run lies. `create` makes one, `open` checks one; the constructor only names paths."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, config_text: str) -> "RunDirectory":
        """Make the directory with config.yaml and versions.json, or nothing at all.

        Args:
            path: absent, or an empty directory.
            config_text: the resolved configuration, YAML.

        Raises:
            RunDirectoryError: the path is a file, holds another run or other files, or cannot be written.
        """
        run = cls(Path(path))
        made: list[Path] = []
        try:
            run._require_empty()
            made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
            run.path.mkdir(parents=True, exist_ok=True)
            run._write_new(config_text)
        except OSError as error:
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
            raise RunDirectoryError(f"cannot create run directory {path}: {error.strerror or error}") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """An existing run.

        Raises:
            RunDirectoryError: no directory there, or one without config.yaml or versions.json.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise RunDirectoryError(f"{path} is not a directory, expected one that a run has made")
        if missing := [file.name for file in (run.config, run.versions) if not file.is_file()]:
            raise RunDirectoryError(f"{path} is not a run directory: {' and '.join(missing)} missing")
        return run

    def _require_empty(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file, expected a new or empty directory")
        if self.config.exists():
            raise RunDirectoryError(f"{self.path} holds another run: resume it, or name a new directory")
        if first := next(self.path.iterdir(), None):
            raise RunDirectoryError(f"{self.path} is not empty (it holds {first.name!r}): name a new directory")

    def _write_new(self, config_text: str) -> None:
        try:
            write_text(self.versions, json.dumps(package_versions(), indent=2) + "\n")
            write_text(self.config, config_text)  # last: its presence marks a run
        except OSError:
            self.versions.unlink(missing_ok=True)
            raise

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def distilled(self) -> Path:
        return self.path / "distilled"

    @property
    def solver(self) -> Path:
        return self.path / "solver"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def samples(self) -> Path:
        return self.images / "samples"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def stages(self) -> Path:
        return self.path / "stages.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluation_rows(self) -> Path:
        return self.path / "evaluation.parquet"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def rollout_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One iteration's rollouts as an Arrow table.

    Args:
        rows: one mapping per rollout with every column of ROLLOUT_SCHEMA, and `rewards`: head -> raw score.
            `action` is [N, A], or flat.

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
    flat = [{**row, "action": np.asarray(row["action"], np.float32).ravel()} for row in rows]
    return pa.Table.from_pylist(flat, schema=schema)


def _check_numbers(row: Mapping[str, Any], heads: Sequence[str]) -> None:
    rollout_id, rewards = row["rollout_id"], row["rewards"]
    if wrong := set(heads) ^ set(rewards):
        raise RewardError(min(wrong), "scored some rollouts of the batch, but not all", [rollout_id])
    for head, value in [*rewards.items(), ("mix", row["reward"])]:
        if not math.isfinite(value):
            raise RewardError(head, f"{value} for prompt {row['prompt']!r}, expected a finite number", [rollout_id])
    for name in ("action", "log_prob", "advantage"):
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
    partial = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunDirectoryError(f"cannot write {path}: {error.strerror or error}") from error
    return path


class MetricsLog:
    """Appends a run's scalars to metrics.jsonl and to TensorBoard.

    Args:
        run: an existing run directory; a torn last row goes, the others stay.
        keep_until: rows after this iteration go too, in both places.
    """

    def __init__(self, run: RunDirectory, keep_until: int | None = None) -> None:
        self._path = run.metrics
        kept = [r for r in read_metrics(self._path) if keep_until is None or r["iteration"] <= keep_until]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")
        purge = None if keep_until is None else keep_until + 1
        self._writer = SummaryWriter(str(run.tensorboard), purge_step=purge, filename_suffix=f".{time.time_ns()}")

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row.

        Args:
            row: finite scalars by name, with "iteration", which is TensorBoard's step.

        Raises:
            ValueError: a value that is not finite.
        """
        for name, value in row.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {name} is {value} at iteration {row['iteration']}, expected a finite number")
        step = int(row["iteration"])
        scalars = {name: value if isinstance(value, int) else float(value) for name, value in row.items()}
        self._file.write(json.dumps(scalars | {"iteration": step}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            if name != "iteration":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._file.close()
        self._writer.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; none where the file is not there yet, and a last row torn by a crash left out.

    Raises:
        RunDirectoryError: a row before the last that is not JSON.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunDirectoryError(f"{path}, line {number}: not JSON ({error.msg})") from error
            log.warning("%s, line %d: torn by a crash, left out", path, number)
    return rows
