"""The form of the state in a checkpoint of a run, and of what else a run that goes on reads."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, InstanceOf, NonNegativeInt, ValidationError

from epd_ray.errors import RunDirectoryError
from epd_ray.runs.origin import Origin
from epd_ray.storage.checkpoint import State, read_checkpoint


def _finite(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
        raise ValueError("expected finite numbers")
    return values


Numbers = Annotated[InstanceOf[np.ndarray], AfterValidator(_finite)]  # type: ignore[type-arg]


class _Validation(BaseModel):
    iteration: NonNegativeInt
    reward: Numbers
    scores: dict[str, Numbers]


class _Curve(BaseModel):
    progress: NonNegativeInt
    validations: list[_Validation]


class _Best(BaseModel):
    reward: float
    iteration: NonNegativeInt
    positions: Numbers
    weights: Numbers
    scale_dir: Numbers | None
    scale_time: Numbers | None
    grid: Numbers | None = None
    history: Numbers | None = None
    guidance: Numbers | None = None
    reuse: Numbers | None = None


class _Own(BaseModel):
    iteration: NonNegativeInt
    window: dict[int, Numbers]
    mixer: dict[str, Any]


class _Learner(BaseModel):
    rl_module: dict[str, dict[str, Numbers]]
    optimizer: dict[str, Any]


class _Algorithm(BaseModel):
    rdpo: _Own
    learner: _Learner


class _State(BaseModel):
    iteration: NonNegativeInt
    algorithm: _Algorithm
    best: _Best
    curve: _Curve
    versions: dict[str, str]
    origin: Origin


def require_state(state: State) -> None:
    """Check that a run can go on from a state.

    Raises:
        RunDirectoryError: a part is missing or of another type; the message has the first one.
    """
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:60]
        raise RunDirectoryError(f"it is no state of a run: {where}: {first['msg']}") from error


def read_state(path: Path) -> State:
    """The state in a checkpoint from which a run can go on.

    Raises:
        RunDirectoryError: the file is missing or damaged, of another version, or holds something else.
    """
    state = read_checkpoint(path)
    try:
        require_state(state)
    except RunDirectoryError as error:
        raise RunDirectoryError(f"{path}: {error}") from error
    return state
