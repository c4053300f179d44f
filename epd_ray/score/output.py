"""A directory of scores: Parquet parts, each written completely or not at all, and a summary."""

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

from epd_ray.errors import RunDirectoryError, importing, shown
from epd_ray.prompts.tables import listed
from epd_ray.score.rows import score_column
from epd_ray.storage.documents import parse_json
from epd_ray.storage.parquet import read_table, write_table
from epd_ray.storage.run_directory import write_text

SUMMARY = "_summary.json"  # pandas and Arrow skip names with an underscore when they open the directory as a table
DAMAGED = "delete it, and its pictures are scored again"
PART = re.compile(r"part-(\d{6})\.parquet")
UNFINISHED = re.compile(r"\.(part-\d{6}\.parquet|_summary\.json)\.tmp")


COLUMNS = ("columns", pa.string(), False, "JSON of the columns that heads read, and of the one that names them")


def score_schema(heads: Mapping[str, Any], with_columns: bool = False) -> pa.Schema:
    """The schema of every part.

    Args:
        heads: maps each head's name to a description in JSON values, which is kept in the file's metadata.
        with_columns: whether heads read columns of a row.
    """
    scores = pa.struct([pa.field(head, pa.float32()) for head in heads])
    described = [
        ("id", pa.string(), False, "path in the folder, tar/key, the Parquet file's own id, or file:row; unique"),
        ("prompt", pa.string(), False, "text that the picture was scored against"),
        *([COLUMNS] if with_columns else []),
        ("scores", scores, False, "each head's raw score; null if the head did not score the picture"),
        ("error", pa.string(), True, "what is wrong with the row; null if every head scored it"),
    ]
    fields = [pa.field(n, kind, nullable=null, metadata={"description": d}) for n, kind, null, d in described]
    return pa.schema(fields, metadata={"schema_version": "1", "heads": json.dumps(heads)})


@dataclass
class Totals:
    """Counts and statistics of all scores in a directory.

    Attributes:
        rows: number of all rows.
        errors: number of rows with an error.
        mean: mean of each head's scores; None for a head without scores.
        std: standard deviation of each head's scores; None for a head without scores.
    """

    rows: int = 0
    errors: int = 0
    mean: dict[str, float | None] = field(default_factory=dict)
    std: dict[str, float | None] = field(default_factory=dict)


class ScoreDirectory:
    """A directory with the scores of one source by one set of heads.

    Args:
        path: a path that does not exist, an empty directory, or one with scores by the same heads.
        heads: maps each head's name to its registry name, options and backend.
        with_columns: whether heads read columns of a row, which are kept too.

    Raises:
        RunDirectoryError: the path is a file, or the directory holds other files or scores by other heads.
    """

    def __init__(self, path: Path, heads: Mapping[str, Mapping[str, Any]], *, with_columns: bool = False) -> None:
        self._about = ("id", "prompt", "columns") if with_columns else ("id", "prompt")
        self.path, self.heads = path, {name: dict(heads[name]) for name in sorted(heads)}
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path} is a file, expected a directory for the scores")
        names = sorted(p.name for p in path.iterdir()) if path.exists() else []
        other = [n for n in names if n != SUMMARY and not PART.fullmatch(n) and not UNFINISHED.fullmatch(n)]
        if other:
            raise RunDirectoryError(f"{path} holds other things ({shown(other[0])}): name another --out")
        self.parts = [path / name for name in names if PART.fullmatch(name)]
        for part in self.parts:
            self._require_same_heads(part)

    def _require_same_heads(self, part: Path) -> None:
        schema = self._open(part)
        fix = "name another --out"
        found = (schema.metadata or {}).get(b"heads", b"null")
        held = parse_json(found, f"heads in {part}", RunDirectoryError, fix)
        if not isinstance(held, dict) or not all(isinstance(facts, dict) for facts in held.values()):
            raise RunDirectoryError(f"{part} holds no scores of this command: {fix}")
        if not schema.equals(score_schema(held, "columns" in self._about)):
            raise RunDirectoryError(f"{part} holds no scores of this command, whose columns are others: {fix}")
        if list(held) != list(self.heads):
            raise RunDirectoryError(
                f"{self.path} holds scores by {listed([*held])}, not by {listed([*self.heads])}: {fix}"
            )
        for name, facts in self.heads.items():
            if differs := [key for key, value in facts.items() if held[name].get(key) != value]:
                key = differs[0]
                raise RunDirectoryError(
                    f"{self.path} holds scores of {shown(name)} with {key} {shown(held[name].get(key))}, "
                    f"now it is {shown(facts[key])}: {fix}"
                )

    @staticmethod
    def _open(part: Path) -> pa.Schema:
        try:
            with importing(RunDirectoryError, part):
                return pq.read_schema(part)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise RunDirectoryError(f"{part} is damaged ({shown(str(error))[1:-1]}): delete it") from error

    def missing(self, index: pa.Table) -> pa.Table:
        """The rows of a source's index that have no complete scores here for their prompt.

        Raises:
            RunDirectoryError: the directory holds scores of pictures that are not in the source.
        """
        done = [self._scored(part) for part in self.parts]
        for part, table in zip(self.parts, done, strict=True):
            others = table.filter(pc.invert(pc.is_in(table["id"], value_set=index["id"].combine_chunks())))
            if len(others):
                raise RunDirectoryError(
                    f"{part} holds {shown(others['id'][0].as_py())}, which the source lacks: name another --out"
                )
        keys = pa.chunked_array([c for t in done for c in self._keys(t).chunks], pa.string())
        return index.filter(pc.invert(pc.is_in(self._keys(index), value_set=keys.combine_chunks())))

    def drop(self, rows: pa.Table) -> None:
        """Remove rows that will be scored again, and unfinished files that a killed run left.

        Args:
            rows: table whose column id names the rows.
        """
        for file in self.path.iterdir() if self.path.exists() else ():
            if UNFINISHED.fullmatch(file.name):
                file.unlink()
        ids = rows["id"].combine_chunks()
        for part in list(self.parts):
            table = read_table(part, DAMAGED)
            kept = table.filter(pc.invert(pc.is_in(table["id"], value_set=ids)))
            if not len(kept):
                part.unlink()
                self.parts.remove(part)
            elif len(kept) < len(table):
                write_table(part, kept)

    def _scored(self, part: Path) -> pa.Table:
        """What tells the rows without an error apart."""
        table = read_table(part, DAMAGED, [*self._about, "error"])
        return table.filter(pc.is_null(table["error"])).select(list(self._about))

    def _keys(self, table: pa.Table) -> pa.ChunkedArray:
        """The picture's id, prompt and columns in one string, which together determine its scores."""
        return pc.binary_join_element_wise(*(table[name] for name in self._about), "\0")

    def add(self, tables: Sequence[pa.Table], models: Mapping[str, str]) -> None:
        """Write scored rows as the next part.

        Args:
            tables: tables with the columns id, prompt, error, and one column of scores per head.
            models: maps each head to its model_id.

        Raises:
            RunDirectoryError: the part cannot be written, or another process has written one of the same number.
        """
        if not tables:
            return
        table = pa.concat_tables(tables)
        scores = [table[score_column(head)].combine_chunks() for head in self.heads]
        facts = {name: {**known, "model_id": models.get(name)} for name, known in self.heads.items()}
        about = [table[name] for name in self._about]
        columns = [*about, pa.StructArray.from_arrays(scores, list(self.heads)), table["error"]]
        number = 1 + max((int(part.name[5:11]) for part in self.parts), default=0)
        path = self.path / f"part-{number:06d}.parquet"
        if path.exists():
            raise RunDirectoryError(f"{path} is there already: another process writes scores into {self.path}")
        write_table(path, pa.Table.from_arrays(columns, schema=score_schema(facts, "columns" in self._about)))
        self.parts.append(path)

    def totals(self) -> Totals:
        """Counts and statistics over all parts, with one part in memory at a time."""
        found, sums = Totals(), {head: np.zeros(3) for head in self.heads}  # count, sum, sum of squares
        for part in self.parts:
            table = read_table(part, DAMAGED, ["scores", "error"])
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
        """Write `facts`, which are JSON values, as the summary."""
        write_text(self.path / SUMMARY, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
