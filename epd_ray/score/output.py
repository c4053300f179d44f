"""A directory of scores: Parquet parts that are added whole, what is missing in them, and a summary."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from epd_ray.errors import RunDirectoryError
from epd_ray.score.rows import score_column
from epd_ray.storage.run_directory import unwritable, whole, write_text

SUMMARY = "_summary.json"  # with the underscore, so that pandas and Arrow open the directory as a table
PART = re.compile(r"part-(\d{6})\.parquet")
UNFINISHED = re.compile(r"\.(part-\d{6}\.parquet|_summary\.json)\.tmp")


def score_schema(heads: Mapping[str, Any]) -> pa.Schema:
    """The columns of every part.

    Args:
        heads: name -> what is known of the head, as JSON values; kept in the file's metadata.
    """
    scores = pa.struct([pa.field(head, pa.float32()) for head in heads])
    described = [
        ("id", pa.string(), False, "path in the folder, tar/key, the Parquet file's own id, or file:row; unique"),
        ("prompt", pa.string(), False, "what the picture was scored against"),
        ("scores", scores, False, "each head's raw score; null where there is none"),
        ("error", pa.string(), True, "what is wrong with the row; null where every head has scored it"),
    ]
    fields = [pa.field(n, kind, nullable=null, metadata={"description": d}) for n, kind, null, d in described]
    return pa.schema(fields, metadata={"schema_version": "1", "heads": json.dumps(heads)})


@dataclass
class Totals:
    """What a directory holds.

    Attributes:
        rows: all of them.
        errors: rows with an error.
        mean, std: head -> of its scores; None where there are none.
    """

    rows: int = 0
    errors: int = 0
    mean: dict[str, float | None] = field(default_factory=dict)
    std: dict[str, float | None] = field(default_factory=dict)


class ScoreDirectory:
    """Scores of one source by one set of heads.

    Args:
        path: absent, empty, or of an earlier run with the same heads.
        heads: name -> registry name, options and backend.

    Raises:
        RunDirectoryError: it is a file, holds other things, or scores by other heads.
    """

    def __init__(self, path: Path, heads: Mapping[str, Mapping[str, Any]]) -> None:
        self.path, self.heads = path, {name: dict(heads[name]) for name in sorted(heads)}
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path} is a file, expected a directory for the scores")
        names = sorted(p.name for p in path.iterdir()) if path.exists() else []
        other = [n for n in names if n != SUMMARY and not PART.fullmatch(n) and not UNFINISHED.fullmatch(n)]
        if other:
            raise RunDirectoryError(f"{path} holds other things ({other[0]!r}): name another --out")
        self.parts = [path / name for name in names if PART.fullmatch(name)]
        for part in self.parts:
            self._require_same_heads(part)

    def _require_same_heads(self, part: Path) -> None:
        metadata = self._open(part).metadata or {}
        try:
            held = json.loads(metadata[b"heads"])
        except (KeyError, ValueError) as error:
            raise RunDirectoryError(f"{part} holds no scores of this command: name another --out") from error
        if list(held) != list(self.heads):
            raise RunDirectoryError(
                f"{self.path} holds scores by {', '.join(held)}, asked are {', '.join(self.heads)}: name another --out"
            )
        for name, facts in self.heads.items():
            if differs := [key for key, value in facts.items() if held[name].get(key) != value]:
                key = differs[0]
                raise RunDirectoryError(
                    f"{self.path} holds scores of {name!r} with {key} {held[name].get(key)}, now it is {facts[key]}: "
                    "name another --out"
                )

    @staticmethod
    def _open(part: Path) -> pa.Schema:
        try:
            return pq.read_schema(part)
        except (pa.ArrowException, OSError) as error:
            raise RunDirectoryError(f"{part} is damaged ({str(error).splitlines()[0]}): delete it") from error

    def missing(self, index: pa.Table) -> pa.Table:
        """The rows of a source that have no scores here for their prompt.

        Raises:
            RunDirectoryError: scores of pictures that the source lacks.
        """
        done = [self._sound(part) for part in self.parts]
        for part, table in zip(self.parts, done, strict=True):
            stranger = table.filter(pc.invert(pc.is_in(table["id"], value_set=index["id"].combine_chunks())))
            if len(stranger):
                raise RunDirectoryError(
                    f"{part} holds {stranger['id'][0].as_py()!r}, which the source lacks: name another --out"
                )
        keys = pa.chunked_array([c for t in done for c in _keys(t).chunks], pa.string())
        return index.filter(pc.invert(pc.is_in(_keys(index), value_set=keys.combine_chunks())))

    def drop(self, rows: pa.Table) -> None:
        """Take rows out, which are about to be scored again; and what a killed run left half-written.

        Args:
            rows: with their ids.
        """
        for file in self.path.iterdir() if self.path.exists() else ():
            if UNFINISHED.fullmatch(file.name):
                file.unlink()
        ids = rows["id"].combine_chunks()
        for part in list(self.parts):
            table = pq.read_table(part)
            kept = table.filter(pc.invert(pc.is_in(table["id"], value_set=ids)))
            if not len(kept):
                part.unlink()
                self.parts.remove(part)
            elif len(kept) < len(table):
                _write(kept, part)

    @staticmethod
    def _sound(part: Path) -> pa.Table:
        return pq.read_table(part, columns=["id", "prompt"], filters=pc.field("error").is_null())

    def add(self, tables: Sequence[pa.Table], models: Mapping[str, str]) -> None:
        """Write scored rows as the next part.

        Args:
            tables: of id, prompt, error, and a score per head.
            models: head -> what its model calls itself.

        Raises:
            RunDirectoryError: the disk refuses, or another process writes there.
        """
        if not tables:
            return
        table = pa.concat_tables(tables)
        scores = [table[score_column(head)].combine_chunks() for head in self.heads]
        facts = {name: {**known, "model_id": models.get(name)} for name, known in self.heads.items()}
        columns = [table["id"], table["prompt"], pa.StructArray.from_arrays(scores, list(self.heads)), table["error"]]
        number = 1 + max((int(part.name[5:11]) for part in self.parts), default=0)
        path = self.path / f"part-{number:06d}.parquet"
        if path.exists():
            raise RunDirectoryError(f"{path} is there already: another process writes scores into {self.path}")
        _write(pa.Table.from_arrays(columns, schema=score_schema(facts)), path)
        self.parts.append(path)

    def totals(self) -> Totals:
        """Counts and moments over all parts, one part in memory at a time."""
        found, sums = Totals(), {head: np.zeros(3) for head in self.heads}  # count, sum, sum of squares
        for part in self.parts:
            table = pq.read_table(part, columns=["scores", "error"])
            found.rows += len(table)
            found.errors += len(table) - table["error"].null_count
            for head, values in zip(self.heads, table["scores"].combine_chunks().flatten(), strict=True):
                x = values.drop_null().to_numpy().astype(np.float64)
                sums[head] += len(x), x.sum(), (x * x).sum()
        for head, (count, total, squares) in sums.items():
            mean = total / count if count else None
            found.mean[head] = mean
            found.std[head] = None if mean is None else float(max(0.0, squares / count - mean**2) ** 0.5)
        return found

    def summarise(self, facts: Mapping[str, Any]) -> None:
        """Write the summary."""
        write_text(self.path / SUMMARY, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _keys(table: pa.Table) -> pa.ChunkedArray:
    """What decides a row's scores: the picture's id and its prompt."""
    return pc.binary_join_element_wise(table["id"], table["prompt"], "\0")


def _write(table: pa.Table, path: Path) -> None:
    """Write a file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    with whole(path) as partial:
        pq.write_table(table, partial, compression="zstd")
