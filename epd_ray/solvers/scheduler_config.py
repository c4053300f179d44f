"""How a solver leaves a run: the configuration of a diffusers scheduler, and the way to the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from epd_ray.errors import TableError

if TYPE_CHECKING:
    from epd_ray.solvers.solver import Solver

SCHEDULER_FILE = "scheduler_config.json"
FLOW_FACTS: dict[str, JsonValue] = {"prediction_type": "flow_prediction", "num_train_timesteps": 1000}

_FIX = "have a write token: run `hf auth login`, set HF_TOKEN, or pass token="


class SchedulerFacts(BaseModel):
    """What a scheduler has to know of a network: `meta["scheduler"]`.

    Attributes:
        prediction_type: what the network's output is.
        num_train_timesteps: its timestep at the largest sigma, about.
        beta_start: of its training schedule in discrete time, as in diffusers; the others too.
        beta_end: see above.
        beta_schedule: see above.
        trained_betas: instead of these three.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
    num_train_timesteps: int = Field(default=1000, ge=2)
    beta_start: float | None = None
    beta_end: float | None = None
    beta_schedule: str | None = None
    trained_betas: list[float] | None = None

    @property
    def has_betas(self) -> bool:
        """Whether the training schedule is given."""
        return self.trained_betas is not None or None not in (self.beta_start, self.beta_end, self.beta_schedule)


def parse_facts(values: object, form: str | None) -> SchedulerFacts:
    """Check what is known of a network against the form of the ODE.

    Args:
        values: a mapping, see `SchedulerFacts`.
        form: "ve" or "flow".

    Returns:
        The facts.

    Raises:
        TableError: a value of the wrong kind, or a prediction that the form does not have.
    """
    try:
        facts = SchedulerFacts.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise TableError(f"scheduler.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if form not in ("ve", "flow"):
        raise TableError(f"form is {form!r}, expected 've' or 'flow' (a scheduler needs to know how noise enters)")
    if (form == "flow") != (facts.prediction_type == "flow_prediction"):
        raise TableError(f"form is {form!r}, which does not go with prediction_type {facts.prediction_type!r}")
    if form == "ve" and not facts.has_betas:
        raise TableError("beta_start, beta_end or beta_schedule is absent (give all three, or trained_betas)")
    return facts


def facts_of(config: Mapping[str, JsonValue], form: str | None) -> dict[str, JsonValue]:
    """What the config of another scheduler of diffusers says about its network.

    Args:
        config: `pipe.scheduler.config`.
        form: of the ODE.

    Returns:
        See `SchedulerFacts`.

    Raises:
        TableError: a training schedule that no sigma fits.
    """
    if form != "flow" and config.get("rescale_betas_zero_snr"):
        raise TableError("this pipeline's scheduler starts at infinite sigma (rescale_betas_zero_snr): not supported")
    given = {name: config[name] for name in SchedulerFacts.model_fields if config.get(name) is not None}
    if form == "flow":  # schedulers for flow models have no prediction type, and betas that nobody reads
        return {name: given.get(name, value) for name, value in FLOW_FACTS.items()}
    if form == "ve" and not given.keys() & {"beta_schedule", "trained_betas"}:
        raise TableError(
            "this pipeline's scheduler has no training betas, as those of flow models (use a matching solver)"
        )
    return {"prediction_type": "epsilon", **given}


def scheduler_config(solver: "Solver", facts: Mapping[str, JsonValue] | None = None) -> dict[str, JsonValue] | None:
    """The arguments of an EPDScheduler that runs a solver.

    Args:
        solver: with `meta["scheduler"]`; in flow form it may be absent.
        facts: instead of those in meta.

    Returns:
        JSON values by name, or None where it is unknown what the network predicts.

    Raises:
        TableError: facts that are wrong or do not fit the form.
    """
    known: object = facts if facts is not None else solver.meta.get("scheduler")
    if solver.form is None or (solver.form == "ve" and known is None):
        return None
    checked = parse_facts(known if known is not None else FLOW_FACTS, solver.form)

    def rows(values: Tensor | None) -> JsonValue:
        return None if values is None else values.double().tolist()

    return {
        "sigmas": rows(solver.sigmas),
        "positions": rows(solver.table.positions),
        "weights": rows(solver.table.weights),
        "scale_dir": rows(solver.table.scale_dir),
        "scale_time": rows(solver.table.scale_time),
        "form": solver.form,
        "afs": solver.afs,
        "solver_order": solver.order,
        **checked.model_dump(),
    }


def upload(repo_id: str, folder: Path, *, token: str | None, private: bool, commit_message: str) -> str:
    """Make a hub repository where there is none, and put a folder's files into it.

    Args:
        repo_id: "owner/name".
        folder: its files are uploaded.
        token: with permission to write; the stored one when None.
        private: whether a new repository is.
        commit_message: of the upload.

    Returns:
        The repository's address.

    Raises:
        TableError: no token, no permission, or no connection.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from epd_ray.weights.hub import HUB_FAILURES, first_line

    if token is None and huggingface_hub.get_token() is None:
        raise TableError(f"{repo_id!r} cannot be written: no token here ({_FIX})")
    api = huggingface_hub.HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=commit_message)
    except HUB_FAILURES as error:
        said = first_line(error)
        if isinstance(error, HFValidationError):
            raise TableError(f"{said} (a hub id is 'owner/name')") from error
        fix = " (is the hub reachable from here?)"
        if isinstance(error, HfHubHTTPError):
            rights = {401: f" ({_FIX})", 403: f" (use an owner that you may write to, and {_FIX})"}
            fix = rights.get(error.response.status_code, "")
        raise TableError(f"{repo_id!r} cannot be written: {said}{fix}") from error
    return str(address)
