"""What people take home: a table with the sigmas it was made for, as one small readable file."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from torch import Tensor

from epd_ray.errors import ScheduleError, TableError
from epd_ray.solvers.epd import Callback, check_options, epd
from epd_ray.solvers.table import SolverTable
from epd_ray.types import Drift, Form

FILE_NAME = "solver.json"
FORMAT_VERSION = 1

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Solver:
    """A solver for one backbone, resolution and guidance scale; checked when made.

    Args:
        table: [N, K], shared by all samples.
        sigmas: [N+1], decreasing, > 0.
        form: of the ODE, "ve" or "flow"; None where unknown.
        afs: analytical first step; needs `form`.
        order: of the slope that leads to the points, 1 to 4.
        meta: what it was made for and from, as JSON values.

    Raises:
        ScheduleError: sigmas that do not decrease or reach 0.
        TableError: parts that do not fit each other.
    """

    table: SolverTable
    sigmas: Tensor
    form: Form | None = None
    afs: bool = False
    order: int = 1
    meta: Mapping[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.table.batch is not None:
            raise TableError(f"the table is for {self.table.batch} samples, expected [N, K] (pick one sample's table)")
        check_options(self.table, self.sigmas, afs=self.afs, order=self.order, form=self.form)

    @property
    def parallel_nfe(self) -> int:
        """Sequential depth: network calls that have to wait for each other."""
        return 2 * self.table.intervals - self.afs

    @property
    def model_evals(self) -> int:
        """All drift evaluations per sample; a backbone with classifier-free guidance runs its network twice in each."""
        return self.table.intervals * (1 + self.table.points) - self.afs

    def solve(self, drift: Drift, x: Tensor, callback: Callback | None = None) -> Tensor:
        """Follow the ODE from sigmas[0] to sigmas[N].

        Args:
            drift: dx/dsigma at (x [B, ...], sigma [B]).
            x: [B, ...], the state at sigmas[0].
            callback: called with (step_index, sigma_next, x) after each interval.

        Returns:
            The state at sigmas[N], [B, ...].
        """
        return epd(drift, x, self.sigmas, self.table, afs=self.afs, order=self.order, form=self.form, callback=callback)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write solver.json and a model card; each file appears whole or not at all.

        Args:
            directory: made where missing.

        Returns:
            The path of solver.json.

        Raises:
            TableError: meta that is not JSON.
        """
        path = Path(directory)
        try:
            text = json.dumps(self._record(), indent=2, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise TableError(f"meta cannot be written as JSON: {error}") from error
        path.mkdir(parents=True, exist_ok=True)
        _write(path / "README.md", self._card())
        return _write(path / FILE_NAME, _inline_rows(text) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> "Solver":
        """Read a solver from a local directory or, where there is none of that name, from the Hugging Face hub.

        Args:
            source: a directory, or a hub id "owner/name".
            revision: of the hub repository: branch, tag or commit.

        Returns:
            The solver, float64.

        Raises:
            TableError: no such file, or one that is not a solver.
        """
        path = Path(source)
        file = path / FILE_NAME if path.is_dir() else _download(os.fspath(source), revision)
        try:
            return cls._parse(file.read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or str(error)
            raise TableError(f"{file}: {reason} (pass a directory that Solver.save_pretrained wrote)") from error
        except (TableError, ScheduleError, UnicodeDecodeError) as error:
            raise TableError(f"{file}: {error}") from error

    def _record(self) -> dict[str, JsonValue]:
        def rows(values: Tensor | None) -> JsonValue:
            return None if values is None else values.double().tolist()

        return {
            "format_version": FORMAT_VERSION,
            "form": self.form,
            "afs": self.afs,
            "order": self.order,
            "sigmas": rows(self.sigmas),
            "positions": rows(self.table.positions),
            "weights": rows(self.table.weights),
            "scale_dir": rows(self.table.scale_dir),
            "scale_time": rows(self.table.scale_time),
            "meta": dict(self.meta),
        }

    @classmethod
    def _parse(cls, text: str) -> "Solver":
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise TableError(f"not valid JSON: {error}") from error
        version = record.get("format_version") if isinstance(record, dict) else None
        if version != FORMAT_VERSION:
            raise TableError(f"format_version is {version!r}, expected {FORMAT_VERSION} (another epd-ray wrote it)")
        try:
            file = _SolverFile.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            raise TableError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        table = SolverTable(
            _matrix("positions", file.positions),
            _matrix("weights", file.weights),
            None if file.scale_dir is None else _matrix("scale_dir", file.scale_dir),
            None if file.scale_time is None else _matrix("scale_time", file.scale_time),
        )
        sigmas = torch.tensor(file.sigmas, dtype=torch.float64)
        return cls(table, sigmas, file.form, file.afs, file.order, file.meta)

    def _card(self) -> str:
        base = self.meta.get("model_id")
        base_line = f"base_model: {base}\n" if isinstance(base, str) and _HUB_ID.fullmatch(base) else ""
        about = "".join(f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |\n" for key, value in self.meta.items())
        spans = pairwise(self.sigmas.tolist())
        rows = zip(spans, self.table.positions.tolist(), self.table.weights.tolist(), strict=True)
        steps = "".join(f"| {a:.5g} to {b:.5g} | {_decimals(r)} | {_decimals(w)} |\n" for (a, b), r, w in rows)
        return _CARD.format(
            base_line=base_line,
            intervals=self.table.intervals,
            points=self.table.points,
            parallel_nfe=self.parallel_nfe,
            model_evals=self.model_evals,
            about=about,
            steps=steps,
        )


class _SolverFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format_version: int
    form: Form | None
    afs: bool
    order: int
    sigmas: list[float]
    positions: list[list[float]]
    weights: list[list[float]]
    scale_dir: list[list[float]] | None = None
    scale_time: list[list[float]] | None = None
    meta: dict[str, JsonValue]


_CARD = """\
---
library_name: epd-ray
tags: [diffusion, ode-solver, epd-solver]
{base_line}---
# A learned diffusion solver

{intervals} intervals with {points} parallel points each: parallel NFE {parallel_nfe} (calls that wait for each other),
{model_evals} evaluations per image in all (twice as many network passes under classifier-free guidance).

```python
from epd_ray.solvers import Solver

solver = Solver.from_pretrained("path/to/this/directory")  # or this repository's id
x = solver.solve(drift, x)  # drift(x [B, ...], sigma [B]) -> dx/dsigma; x: the state at solver.sigmas[0]
```

| Made with | |
|---|---|
{about}
| Interval (sigma) | Positions | Weights |
|---|---|---|
{steps}
Method: EPD-Solver (arXiv 2507.14797) and RDPO (arXiv 2512.22796).
"""


def _decimals(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _matrix(name: str, rows: list[list[float]]) -> Tensor:
    if len({len(row) for row in rows}) > 1:
        raise TableError(f"{name} has rows of {sorted({len(row) for row in rows})} values, expected one length")
    return torch.tensor(rows, dtype=torch.float64)


def _inline_rows(text: str) -> str:
    """Put each innermost list of numbers on one line; JSON strings hold no raw newline, so none is touched."""
    return re.sub(r"\[\n[^\[\]{}\"]*\]", lambda rows: " ".join(rows[0].split()), text)


def _write(path: Path, text: str) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as out:
        temporary = Path(out.name)
        try:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


def _download(repo_id: str, revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(repo_id):
        raise TableError(f"{repo_id!r} is no directory (pass one that holds {FILE_NAME}, or a hub id 'owner/name')")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, FILE_NAME, revision=revision))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TableError(f"{repo_id!r} is no directory and was not found on the hub: {reason}") from error
