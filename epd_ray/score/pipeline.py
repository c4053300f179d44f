"""Scores pictures by the hundred thousand: Ray Data reads and decodes them, and one actor pool per head scores them."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data.exceptions import ExecutionTimeoutError

from epd_ray.actors.beforehand import panel_of
from epd_ray.actors.cluster import require_room, stop_signals, warn_of_idle_gpus
from epd_ray.actors.configured import head_gpus, reward_spec, run_session
from epd_ray.actors.pool import last_line
from epd_ray.actors.reward_pool import RewardSpec, unwrap
from epd_ray.config.run_config import RunConfig
from epd_ray.config.services import ClusterConfig
from epd_ray.errors import ConfigError, EpdRayError, ModelError
from epd_ray.prompts.panel import Panel
from epd_ray.score.inputs import read_index
from epd_ray.score.output import ScoreDirectory
from epd_ray.score.rows import BLOCK_BYTES, decode, pieces
from epd_ray.score.stage import HeadStage, model_column
from epd_ray.telemetry.progress import Observer, counted, duration
from epd_ray.types import Metadata

PART_ROWS, PART_SECONDS = 10_000, 30.0  # a part is written when it has so many rows, or after so many seconds
STORE_BYTES = 512 << 20  # bytes of the object store for each reward actor, and for reading
ROOM_SECONDS = ClusterConfig().placement_timeout_s
STILL_SECONDS = 1800.0  # scoring fails after so many seconds without progress
TRIED_ROWS = 1000  # from which a row is taken with which a reward server is tried
READING = {"CPU": 1.0}  # resources of a task that reads and decodes


class TooManyErrors(EpdRayError):
    """More rows failed than ScoreRequest.max_errors allows."""


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, and where the scores are written.

    Attributes:
        source: pictures to score, as for `read_index`.
        out: directory of the scores.
        prompts: prompt file for a folder of images, as for `read_index`.
        batch_size: number of pictures per call of a head.
        max_errors: share of the source's rows that may fail, in [0, 1].
    """

    source: str
    out: Path
    prompts: Path | None = None
    batch_size: int = 32
    max_errors: float = 0.01


def score(request: ScoreRequest, config: RunConfig, observer: Observer) -> list[str]:
    """Score the rows of a source that have no scores in `request.out` yet.

    Args:
        request: what to score.
        config: its section `rewards` names the heads, and `cluster` the Ray cluster.
        observer: receives the progress.

    Returns:
        The results in a few lines.

    Raises:
        EpdRayError: the user can fix the problem. Finished scores are kept, and the same call scores the rest.
    """
    if without := [name for name, reward in config.rewards.items() if not reward.replicas]:
        raise ConfigError([f"rewards.{without[0]}.replicas is 0, but scoring needs actors: set it to at least 1"])
    panel = panel_of(config)
    index = read_index(request.source, request.prompts, panel)
    heads = {n: {"head": r.head, "backend": r.backend, "options": r.options} for n, r in config.rewards.items()}
    out = ScoreDirectory(request.out, heads, with_columns=bool(panel.columns))
    todo = out.missing(index)
    specs = {name: reward_spec(reward) for name, reward in config.rewards.items()}
    limit = int(request.max_errors * len(index))
    start = time.perf_counter()
    if len(todo):
        _PartWriter(out, limit).count(todo)  # too many rows without a prompt raise before Ray starts
        observer.stage("starting Ray", 1)
        with run_session(config, _first_rows(todo)), stop_signals():
            observer.advance()
            warn_of_idle_gpus(head_gpus(config))
            out.drop(todo)
            judging = panel if panel.columns else None
            tables = scored(todo, specs, request.batch_size, config.cluster.placement_timeout_s, judging)
            _write_all(tables, len(todo), _PartWriter(out, limit), observer)
    return _summarised(request, index, out, len(todo), time.perf_counter() - start)


def _first_rows(index: pa.Table) -> dict[str, Metadata]:
    """The columns of some pictures by their ids, with which reward servers are tried."""
    if "columns" not in index.column_names:
        return {}
    few = index.filter(pc.is_null(index["error"])).slice(0, TRIED_ROWS)
    return {row["id"]: json.loads(row["columns"]) for row in few.select(["id", "columns"]).to_pylist()}


def _write_all(tables: Iterator[pa.Table], count: int, writer: "_PartWriter", observer: Observer) -> None:
    observer.stage("scoring", count)
    start = time.perf_counter()
    rows = 0
    try:
        for table in tables:
            writer.add(table)
            rows += len(table)
            observer.advance(len(table), failed=writer.failed, images_per_s=rows / (time.perf_counter() - start))
    finally:
        writer.flush()


def scored(
    index: pa.Table,
    specs: Mapping[str, RewardSpec],
    batch_size: int,
    timeout_s: float = ROOM_SECONDS,
    panel: Panel | None = None,
) -> Iterator[pa.Table]:
    """Score the pictures of an index; yields tables of rows in the order in which they are finished.

    Batches form as pictures arrive. The last bits of a score may therefore differ between runs, if a head's result
    depends on the other pictures of the batch.

    Args:
        index: the pictures, as `read_index` returns them.
        specs: maps each head's name to its spec.
        batch_size: number of pictures per call of a head.
        timeout_s: seconds to wait for nodes to join the cluster.
        panel: the heads, where the index has columns that they read; else None.

    Raises:
        EpdRayError: a head cannot be built, or its process died repeatedly on the same rows.
        PlacementError: the cluster has no room for the actors and one CPU for reading.
    """
    heads = [s.bundle for s in specs.values() for _ in range(s.replicas)]
    require_room({"reward actors": heads, "reading": [READING]}, timeout_s)
    with _quiet_data(sum(s.max_replicas or s.replicas for s in specs.values())):
        data = ray.data.from_arrow(pieces(index))
        data = data.map_batches(decode, batch_size=None, batch_format="pyarrow", num_cpus=READING["CPU"])
        for i, (name, spec) in enumerate(specs.items(), start=1):
            most = max(spec.replicas, spec.max_replicas or spec.replicas)
            least = min(spec.replicas, spec.min_replicas or spec.replicas)
            here = spec.python is None  # otherwise an actor in the head's environment requests the resources
            data = data.map_batches(
                HeadStage,
                fn_constructor_args=(name, spec, i == len(specs), panel),
                batch_size=batch_size,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=least, max_size=most, initial_size=spec.replicas),
                num_cpus=spec.num_cpus if here else 0,
                num_gpus=spec.num_gpus if here else 0,
                resources=dict(spec.resources) if here else None,
            )
        try:
            yield from data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        except ExecutionTimeoutError as error:
            problem = f"no row was scored for {STILL_SECONDS:.0f} s: a head hangs, or its process dies again and again"
            raise ModelError(problem) from error
        except ray.exceptions.RayError as error:
            raise _cause(error) from None


class _PartWriter:
    """Collects scored rows, writes them as parts, and counts those that failed.

    Args:
        out: directory of the scores.
        limit: number of rows that may fail.

    Attributes:
        failed: number of rows that failed so far.
    """

    def __init__(self, out: ScoreDirectory, limit: int) -> None:
        self._out, self._limit = out, limit
        self._tables: list[pa.Table] = []
        self._models: dict[str, str] = {}
        self._since = time.monotonic()
        self.failed = 0

    def add(self, table: pa.Table) -> None:
        """Add rows, and write a part when it is large or old enough.

        Raises:
            TooManyErrors: with these rows, more than `limit` have failed; all rows so far are kept.
        """
        self._tables.append(table)
        self._models |= {head: table[model_column(head)][0].as_py() for head in self._out.heads}
        rows = sum(len(t) for t in self._tables)
        if rows >= PART_ROWS or time.monotonic() - self._since >= PART_SECONDS:
            self.flush()
        self.count(table)

    def count(self, rows: pa.Table) -> None:
        """Add the failed ones among these rows to the count.

        Raises:
            TooManyErrors: more than `limit` rows have failed.
        """
        bad = rows.filter(pc.is_valid(rows["error"]))
        self.failed += len(bad)
        if self.failed > self._limit:
            raise TooManyErrors(
                f"{self.failed} rows failed, at most {self._limit} may (such as {bad['id'][0]}: {bad['error'][0]}): "
                f"mend them, or raise --max-errors; what was scored is kept in {self._out.path}"
            )

    def flush(self) -> None:
        """Write the collected rows as a part."""
        tables, self._tables = self._tables, []  # emptied before writing, so that a signal cannot cause a second write
        self._out.add(tables, self._models)
        self._since = time.monotonic()


@contextmanager
def _quiet_data(actors: int) -> Iterator[None]:
    """Let Ray Data print nothing, use bounded memory for `actors` reward actors, and fail when it makes no progress."""
    for name in ("ray.data", "ray.anyscale"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # otherwise Ray Data loses the cause
    context.execution_no_progress_timeout_s = STILL_SECONDS
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=STORE_BYTES * (1 + actors))
    with DataContext.current(context):
        yield


def _cause(error: ray.exceptions.RayError) -> EpdRayError:
    """The error of a stage, without the text that Ray Data adds."""
    if not isinstance(error, ray.exceptions.RayTaskError):
        return ModelError(f"scoring ended early: {last_line(error)}")
    cause = unwrap(error)
    text = str(cause).partition("\nFailed to apply")[0]
    return ModelError(text if isinstance(cause, EpdRayError) else f"scoring failed with {type(cause).__name__}: {text}")


def _summarised(request: ScoreRequest, index: pa.Table, out: ScoreDirectory, rows: int, seconds: float) -> list[str]:
    totals = out.totals()
    heads = {name: {**known, "mean": totals.mean[name], "std": totals.std[name]} for name, known in out.heads.items()}
    speed = rows / seconds if rows else None
    run = {"rows": rows, "seconds": round(seconds, 3), "images_per_s": None if speed is None else round(speed, 2)}
    counts = {"rows": totals.rows, "scored": totals.rows - totals.errors, "errors": totals.errors}
    out.summarise({"source": request.source, **counts, "heads": heads, "last_run": run})
    lines = [
        f"{name}: mean {facts['mean']:.4f}, std {facts['std']:.4f}"
        for name, facts in heads.items()
        if facts["mean"] is not None
    ]
    done = "nothing was missing"
    if speed:
        rate = f"{speed:.2g}" if speed < 10 else f"{speed:,.0f}"
        done = f"scored {counted(rows, 'row')} in {duration(seconds)} ({rate} images/s)"
    return [
        f"{done}: {counts['scored']} of {counted(len(index), 'picture')} scored, {totals.errors} failed",
        *lines,
        f"scores: {request.out}",
    ]
