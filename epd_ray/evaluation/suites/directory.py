"""The directory of a suite's results: a manifest that says what they measure, and a Parquet file for each shard."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pydantic import JsonValue

from epd_ray.errors import RunDirectoryError, shown
from epd_ray.storage.documents import read_json
from epd_ray.storage.parquet import read_table, write_table
from epd_ray.storage.run_directory import unwritable, write_text

LOCK, CACHE, TUNED = ".lock", "features", "tuned.json"
OWN = {LOCK, CACHE, TUNED}
"""Names of files and folders that may be in the directory before the manifest is."""
FORMAT = 1
Facts = Mapping[str, JsonValue]


@dataclass(frozen=True)
class Manifest:
    """What results were measured on. One directory holds only results with equal sections.

    Attributes:
        sections: "model", "prompts", "heads" and so on -> facts as JSON values.
        samplers: sampler's key -> facts as JSON values, with a checksum "sha256". A later call may add samplers.
    """

    sections: Mapping[str, Facts]
    samplers: Mapping[str, Facts]

    def difference(self, now: "Manifest") -> str | None:
        """Say which fact is the first that differs: "model.resolution was 512, now 1024". None if no fact does."""
        for name in [*self.sections, *now.sections]:
            old, new = self.sections.get(name, {}), now.sections.get(name, {})
            for key in [*old, *new]:
                if old.get(key) != new.get(key):
                    return f"{name}.{key} was {_short(old.get(key))}, now {_short(new.get(key))}"
        for key in self.samplers.keys() & now.samplers.keys():
            if self.samplers[key].get("sha256") != now.samplers[key].get("sha256"):
                return f"sampler {key} was another one"
        return None


def _short(value: JsonValue) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class ResultsDirectory:
    """The directory of a suite's results. The constructor touches no file.

    Args:
        path: a directory that is absent, empty, or has results.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def solvers(self) -> Path:
        return self.path / "solvers"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def prepare(self) -> None:
        """Make the directory, or check that it holds nothing but results.

        Raises:
            RunDirectoryError: the path is a file, the directory holds other things, or the disk refuses.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file, expected a directory for the results: name another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            other = sorted(p.name for p in self.path.iterdir() if p.name not in OWN and not p.name.endswith(".tmp"))
        except OSError as error:
            raise unwritable(self.path, error) from error
        if other and not self.manifest.is_file():
            raise RunDirectoryError(f"{self.path} holds other things ({shown(other[0])}): name another --out")

    def claim(self, manifest: Manifest) -> None:
        """Write the manifest; results that are there already must have the same sections, and samplers are added.

        Raises:
            RunDirectoryError: the directory has results of something else, or its manifest cannot be read.
        """
        samplers = dict(manifest.samplers)
        if (before := self._read()) is not None:
            if difference := before.difference(manifest):
                raise RunDirectoryError(f"{self.path} holds other results: {difference} (name another --out)")
            samplers = {**before.samplers, **samplers}
        record = {"format": FORMAT, **manifest.sections, "samplers": samplers}
        write_text(self.manifest, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def _read(self) -> Manifest | None:
        if not self.manifest.is_file():
            return None
        record = read_json(self.manifest, RunDirectoryError, "name another --out")
        if not isinstance(record, dict) or not {"format", "samplers"} <= record.keys():
            raise RunDirectoryError(f"{self.manifest} cannot be read (no format or samplers): name another --out")
        sections = [value for key, value in record.items() if key != "format"]
        facts = record["samplers"].values() if isinstance(record["samplers"], dict) else ()
        if not all(isinstance(part, dict) for part in [*sections, *facts]):
            raise RunDirectoryError(f"{self.manifest} cannot be read (sections are mappings): name another --out")
        found, samplers = record.pop("format"), record.pop("samplers")
        if found != FORMAT:
            raise RunDirectoryError(f"{self.manifest} has format {shown(found)}, expected {FORMAT}: name another --out")
        return Manifest(record, samplers)

    def _shard(self, sampler: str, shard: int) -> Path:
        return self.scores / sampler / f"{shard:06d}.parquet"

    def has(self, sampler: str, shard: int) -> bool:
        """Whether a sampler's shard is finished."""
        return self._shard(sampler, shard).is_file()

    def add(self, sampler: str, shard: int, rows: pa.Table) -> None:
        """Write the rows of a sampler's shard, whole or not at all.

        Raises:
            RunDirectoryError: the disk refuses.
        """
        write_table(self._shard(sampler, shard), rows)

    def columns(self, sampler: str) -> list[str]:
        """The names of the columns of a sampler's rows, read from its first shard, which must be finished."""
        return list(next(self.parts(sampler, [0])).column_names)

    def read(self, sampler: str, shards: Iterable[int], columns: list[str] | None = None) -> pa.Table:
        """Read a sampler's rows in the order of the shards.

        Args:
            sampler: the sampler's key.
            shards: the numbers of at least one shard; all must be finished.
            columns: the names of the columns to read; None reads all.

        Raises:
            RunDirectoryError: a file is damaged.
        """
        return pa.concat_tables(list(self.parts(sampler, shards, columns)))

    def parts(self, sampler: str, shards: Iterable[int], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read a sampler's rows as `read` does, one shard at a time."""
        for shard in shards:
            yield read_table(self._shard(sampler, shard), "delete it, and evaluate again", columns)
