"""The configuration of an EPDScheduler, and the facts about a network that it contains."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from epd_ray.errors import TableError, first_problem, shown
from epd_ray.solvers.table import Rows, SolverTable
from epd_ray.types import Form

SCHEDULER_FILE = "scheduler_config.json"
TRAIN_TIMESTEPS = 1000
"""Timesteps of a network's training, unless its scheduler says otherwise; a flow's timestep is sigma times this."""

UNSET = "_use_default_values"
"""Where diffusers keeps the names of a configuration's keys that other schedulers pass over."""

FLOW_FACTS: dict[str, JsonValue] = {"prediction_type": "flow_prediction", "num_train_timesteps": TRAIN_TIMESTEPS}

VEPrediction = Literal["epsilon", "v_prediction", "sample"]
"""What the output of a network in VE form may be."""


class SchedulerFacts(BaseModel):
    """What a scheduler has to know about a network; a solver keeps it as `meta["scheduler"]`.

    The betas describe the training schedule of a network in VE form, under diffusers' names; flow models have none.

    Attributes:
        prediction_type: what the network's output is.
        num_train_timesteps: number of timesteps T in training.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: diffusers' name of the curve between them.
        trained_betas: all T betas, in place of the three values above.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prediction_type: Literal[VEPrediction, "flow_prediction"]
    num_train_timesteps: int = Field(default=TRAIN_TIMESTEPS, ge=2)
    beta_start: float | None = None
    beta_end: float | None = None
    beta_schedule: str | None = None
    trained_betas: list[float] | None = None

    @property
    def has_betas(self) -> bool:
        """Whether the training schedule is known."""
        return self.trained_betas is not None or None not in (self.beta_start, self.beta_end, self.beta_schedule)


def parse_facts(values: object, form: str | None) -> SchedulerFacts:
    """Check the facts about a network, and that they fit the form of the ODE.

    Args:
        values: a mapping with the fields of `SchedulerFacts`.
        form: how noise enters x, "ve" or "flow".

    Returns:
        The checked facts.

    Raises:
        TableError: a value of the wrong kind, a prediction type that the form does not have, or absent betas.
    """
    try:
        facts = SchedulerFacts.model_validate(values)
    except ValidationError as error:
        raise TableError(f"scheduler.{first_problem(error)}") from error
    if form not in ("ve", "flow"):
        raise TableError(f"form is {shown(form)}, expected 've' or 'flow' (a scheduler needs to know how noise enters)")
    if (form == "flow") != (facts.prediction_type == "flow_prediction"):
        raise TableError(
            f"form is {shown(form)}, which does not go with prediction_type {shown(facts.prediction_type)}"
        )
    if form == "ve" and not facts.has_betas:
        raise TableError("beta_start, beta_end or beta_schedule is absent (give all three, or trained_betas)")
    return facts


class SolverValues(BaseModel):
    """The other values in the configuration of an EPDScheduler, of which only the kinds are checked here."""

    model_config = ConfigDict(strict=True, frozen=True)

    sigmas: list[float]
    positions: Rows
    weights: Rows
    scale_dir: Rows | None
    scale_time: Rows | None
    history: Rows | None
    guidance: list[float] | None
    reuse: list[bool] | None
    afs: bool
    multistep_order: int
    backbone: str | None
    replaced: dict[str, JsonValue] | None


def check_values(values: Mapping[str, object]) -> None:
    """Refuse values of the wrong kind in the configuration of an EPDScheduler.

    Raises:
        TableError: the message names the first one.
    """
    try:
        found = SolverValues.model_validate(values)
    except ValidationError as error:
        raise TableError(f"scheduler.{first_problem(error)}") from error
    unset = (found.replaced or {}).get(UNSET, [])
    if not isinstance(unset, list) or not all(isinstance(name, str) for name in unset):
        raise TableError(f"scheduler.replaced.{UNSET} is {shown(unset)}, expected a list of names")


def facts_of(config: Mapping[str, JsonValue], form: str | None) -> dict[str, JsonValue]:
    """The facts about a network that the configuration of a diffusers scheduler contains.

    Args:
        config: `pipe.scheduler.config`.
        form: how noise enters x in the solver that shall run, "ve" or "flow".

    Returns:
        Fields of `SchedulerFacts`, as JSON values.

    Raises:
        TableError: a training schedule that starts at infinite sigma, or one without betas in VE form.
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


def scheduler_config(
    table: SolverTable, sigmas: Tensor, form: Form | None, known: object, *, afs: bool, order: int
) -> dict[str, JsonValue] | None:
    """The arguments of an EPDScheduler that runs a solver.

    Args:
        table: [N, K].
        sigmas: [N+1], decreasing, > 0.
        form: how noise enters x; None where it is unknown.
        known: the facts about the network, fields of `SchedulerFacts`. In flow form, None stands for FLOW_FACTS.
        afs: whether the first drift is analytical.
        order: of the multistep slope, 1 to 4.

    Returns:
        JSON values by name, or None where it is unknown what the network predicts.

    Raises:
        TableError: facts that are wrong, or that do not fit the form.
    """
    if form is None or (form == "ve" and known is None):
        return None
    checked = parse_facts(known if known is not None else FLOW_FACTS, form)
    return {
        "sigmas": sigmas.tolist(),
        **table.to_lists(),
        "form": form,
        "afs": afs,
        "multistep_order": order,
        **checked.model_dump(),
    }
