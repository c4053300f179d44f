"""A trained solver: a table with the sigmas that it was made for, saved as one small readable file."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from torch import Tensor

from epd_ray.errors import ScheduleError, TableError, first_problem, importing, shown
from epd_ray.registry import did_you_mean
from epd_ray.solvers.card import HUB_ID, local_model, model_card, takes_prompts
from epd_ray.solvers.costs import Cost
from epd_ray.solvers.epd import Callback, check_options, epd
from epd_ray.solvers.grid import levels
from epd_ray.solvers.presets import PRESETS
from epd_ray.solvers.scheduler_config import SCHEDULER_FILE, scheduler_config
from epd_ray.solvers.table import COLUMN_NAMES, Rows, SolverTable
from epd_ray.storage.documents import read_json
from epd_ray.types import Drift, Form

FILE_NAME = "solver.json"
FORMAT_VERSIONS = (1, 2)
"""Version 2 is a solver with a history, or with the guidance of each interval; every other solver is version 1."""
REFERENCE_SUFFIX = ".pkl"
FURTHER = ("history", "guidance", "reuse")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Solver:
    """A solver for one backbone, resolution and guidance scale; checked when made.

    Args:
        table: [N, K], shared by all samples. Its grid, if it has one, is applied to the sigmas and is then gone.
        sigmas: [N+1], decreasing, > 0.
        form: how noise enters x, "ve" or "flow"; None where it is unknown.
        afs: whether the first drift is analytical, which saves one evaluation; needs `form`.
        order: order of the multistep slope that leads from an interval's start to its points, 1 to 4.
        meta: JSON values that say what the solver was made for and how.

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
        if self.table.grid is not None:
            object.__setattr__(self, "sigmas", levels(self.table, self.sigmas))
            object.__setattr__(self, "table", replace(self.table, grid=None))

    @property
    def cost(self) -> Cost:
        """The evaluations of the drift that one picture takes."""
        return self.table.cost(self.afs)

    @property
    def parallel_nfe(self) -> int:
        """The longest chain of evaluations that wait for each other."""
        return self.cost.parallel_nfe

    @property
    def model_evals(self) -> int:
        """All evaluations of the drift."""
        return self.cost.model_evals

    @property
    def network_passes(self) -> int | None:
        """All passes of the network, two an evaluation with classifier-free guidance; None if `meta` lacks a fact."""
        return self.cost.passes_by(self.meta)

    def scheduler_config(self, facts: Mapping[str, JsonValue] | None = None) -> dict[str, JsonValue] | None:
        """The arguments of an EPDScheduler that runs this solver; None where it is unknown what the network predicts.

        Args:
            facts: what is known of the network, see `SchedulerFacts`; None means `meta["scheduler"]`.

        Raises:
            TableError: facts that are wrong, or that do not fit the form.
        """
        known = self.meta.get("scheduler") if facts is None else facts
        config = scheduler_config(self.table, self.sigmas, self.form, known, afs=self.afs, order=self.order)
        return None if config is None else {**config, "backbone": self.meta.get("backbone")}

    def card(self, source: str, *, has_scheduler: bool) -> str:
        """The model card for the directory of this solver, see `epd_ray.solvers.card.model_card`."""
        return model_card(self.table, self.sigmas, self.cost, self.meta, source, has_scheduler=has_scheduler)

    def solve(self, drift: Drift, x: Tensor, callback: Callback | None = None) -> Tensor:
        """Solve the ODE from sigmas[0] to sigmas[N].

        Args:
            drift: returns dx/dsigma at (x [B, ...], sigma [B]).
            x: [B, ...], the state at sigmas[0].
            callback: called with (step_index, sigma_next, x) after each interval.

        Returns:
            The state at sigmas[N], [B, ...].
        """
        return epd(drift, x, self.sigmas, self.table, afs=self.afs, order=self.order, form=self.form, callback=callback)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write solver.json, a model card and the configuration of an EPDScheduler.

        Each file appears whole or not at all. The configuration is left out where `meta["scheduler"]` is absent in VE
        form, where the form is unknown, and for unconditional models, whose pipelines do not scale their inputs.

        Args:
            directory: made where it is missing.

        Returns:
            The path of solver.json.

        Raises:
            TableError: meta that is not JSON, or that contradicts the form.
        """
        return self._save(Path(directory), "path/to/this/directory")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool = False,
        commit_message: str = "Upload a learned diffusion solver",
    ) -> str:
        """Upload the files of `save_pretrained` to a repository of the Hugging Face hub, which is made if necessary.

        If `meta["model_id"]` is a path on this machine, only its last component is published.

        Args:
            repo_id: "owner/name".
            token: with permission to write; None means the one that `hf auth login` stored.
            private: whether a new repository is private.
            commit_message: the message of the upload's commit.

        Returns:
            The repository's address.

        Raises:
            TableError: no token, no permission, no connection, or meta that `save_pretrained` refuses.
        """
        from epd_ray.weights.publish import upload  # here, since the hub's client takes long to import

        published = self
        if (local := local_model(self.meta)) is not None:
            name = Path(local).expanduser().resolve().name
            log.warning("model_id is published as %r: %r is a path on this machine", name, local)
            published = replace(self, meta={**self.meta, "model_id": name})
        with tempfile.TemporaryDirectory() as folder:
            published._save(Path(folder), repo_id)
            return upload(repo_id, Path(folder), token=token, private=private, commit_message=commit_message)

    def _save(self, path: Path, source: str) -> Path:
        """Write the files into `path`; the card tells people to load the solver from `source`."""
        config = self.scheduler_config()
        if not takes_prompts(self.meta):  # their pipelines do not scale inputs, so no EPDScheduler fits them
            config = None
        record = self._record()
        try:
            text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise TableError(f"meta cannot be written as JSON: {error}") from error
        path.mkdir(parents=True, exist_ok=True)
        _write(path / "README.md", self.card(source, has_scheduler=config is not None))
        if config is None:
            (path / SCHEDULER_FILE).unlink(missing_ok=True)
        else:
            named = json.dumps({"_class_name": "EPDScheduler", **config}, indent=2)
            _write(path / SCHEDULER_FILE, _inline_rows(named) + "\n")
        return _write(path / FILE_NAME, _inline_rows(text) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> "Solver":
        """Read a solver from a local directory or file, or else from a preset or the hub.

        Args:
            source: a directory, a solver file, a preset ("sd3-1024-rl"), or a Hugging Face hub id "owner/name".
            revision: branch, tag or commit of the hub repository.

        Returns:
            The solver, float64.

        Raises:
            TableError: there is no such file, or it is not a solver.
        """
        path, name = Path(source), os.fspath(source)
        if path.is_dir():
            file = path / FILE_NAME
        elif path.suffix == REFERENCE_SUFFIX:
            raise TableError(
                f"{name} is no solver of this project (if it is one of the reference: epd-ray tables import {name} "
                "--out DIR, then use DIR)"
            )
        elif path.is_file():
            file = path
        else:
            file = PRESETS[name] if name in PRESETS else _download(name, revision)
        record = read_json(file, TableError, "pass a directory that Solver.save_pretrained wrote")
        try:
            with importing(TableError, "it"):
                return cls._parse(record)
        except (TableError, ScheduleError) as error:
            raise TableError(f"{file}: {error}") from error

    def _record(self) -> dict[str, JsonValue]:
        return {
            "format_version": FORMAT_VERSIONS[self.table.history is not None or self.table.guides],
            "form": self.form,
            "afs": self.afs,
            "order": self.order,
            "sigmas": self.sigmas.tolist(),
            **self.table.to_lists(),
            "meta": dict(self.meta),
        }

    @classmethod
    def _parse(cls, record: Any) -> "Solver":
        version = record.get("format_version") if isinstance(record, dict) else None
        if version not in FORMAT_VERSIONS:
            raise TableError(
                f"format_version is {shown(version)}, expected 1 or 2: a newer epd-ray wrote it, install that one"
            )
        try:
            file = _SolverFile.model_validate(record)
        except ValidationError as error:
            raise TableError(first_problem(error)) from error
        table = SolverTable.from_lists({name: getattr(file, name) for name in (*COLUMN_NAMES, *FURTHER)})
        sigmas = torch.tensor(file.sigmas, dtype=torch.float64)
        return cls(table, sigmas, file.form, file.afs, file.order, file.meta)


class _SolverFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format_version: int
    form: Form | None
    afs: bool
    order: int
    sigmas: list[float]
    positions: Rows
    weights: Rows
    scale_dir: Rows | None = None
    scale_time: Rows | None = None
    history: Rows | None = None
    guidance: list[float] | None = None
    reuse: list[bool] | None = None
    meta: dict[str, JsonValue]


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
    if not HUB_ID.fullmatch(repo_id):
        raise TableError(
            f"{shown(repo_id)} is no directory (pass one that holds {FILE_NAME}, a hub id 'owner/name', or a preset"
            f"{did_you_mean(repo_id, PRESETS)})"
        )
    import huggingface_hub  # here, since the hub's client takes long to import

    from epd_ray.weights.hub import HUB_FAILURES, explain, seek_hub

    seek_hub()
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, FILE_NAME, revision=revision))
    except HUB_FAILURES as error:
        raise TableError(
            f"{shown(repo_id)} is no directory, and not to be had from the hub: {explain(error)}"
        ) from error
