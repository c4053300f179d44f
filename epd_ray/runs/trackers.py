"""W&B and MLflow, where a run or a sweep asks for them, by the integrations and callbacks that Ray has."""

import importlib.util
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from epd_ray.config.services import MlflowConfig, TrackingConfig, WandbConfig
from epd_ray.errors import ConfigError, RunDirectoryError, shown
from epd_ray.storage.documents import read_json
from epd_ray.storage.run_directory import RunDirectory, write_text

log = logging.getLogger(__name__)

TRACKING = "tracking.json"  # in the run directory: the id of the run at each tracker
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # module -> the smallest package that contains it


class Sink(Protocol):
    """Takes the rows of metrics of a run, one per iteration."""

    def write(self, row: Mapping[str, float]) -> None:
        """Take a row: finite numbers by name, of which one is "iteration"."""
        ...


def require_trackers(tracking: TrackingConfig) -> None:
    """Check that the packages of the chosen trackers are installed.

    Raises:
        ConfigError: a package is missing.
    """
    asked = [name for name, section in (("wandb", tracking.wandb), ("mlflow", tracking.mlflow)) if section is not None]
    missing = [name for name in asked if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [f"tracking.{n}: the package {n} is not installed: pip install {PACKAGES[n]}" for n in missing]
        )


@contextmanager
def trackers(tracking: TrackingConfig, run: RunDirectory, config: Mapping[str, Any]) -> Iterator[list[Sink]]:
    """Open the chosen trackers. A run that is resumed continues under its id.

    Args:
        tracking: the trackers and their settings.
        run: the run directory, which stores the id of the run at each tracker.
        config: the configuration of the run, which the trackers show beside its metrics.

    Raises:
        ConfigError: a package or a key is missing, or a server refuses the run.
        RunDirectoryError: the stored ids cannot be read.
    """
    require_trackers(tracking)
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if tracking.wandb is not None:
            sinks.append(stack.enter_context(_wandb(tracking.wandb, run, config)))
        if tracking.mlflow is not None:
            sinks.append(stack.enter_context(_mlflow(tracking.mlflow, run, config)))
        yield sinks


def tune_callbacks(tracking: TrackingConfig) -> list[Any]:
    """Ray's callbacks for `tune.RunConfig(callbacks=...)`, which make each trial a run of the chosen trackers.

    Raises:
        ConfigError: a package is missing.
    """
    require_trackers(tracking)
    callbacks: list[Any] = []
    if tracking.wandb is not None:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks.append(WandbLoggerCallback(project=tracking.wandb.project, group=tracking.wandb.group))
    if tracking.mlflow is not None:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        section = tracking.mlflow
        callbacks.append(MLflowLoggerCallback(section.tracking_uri, experiment_name=section.experiment))
    return callbacks


def known_runs(run: RunDirectory) -> dict[str, str]:
    """The id of the run at each tracker, by the tracker's name; empty where none is stored.

    Raises:
        RunDirectoryError: the file cannot be read, or holds something else.
    """
    path = run.path / TRACKING
    if not path.exists():
        return {}
    fix = "delete it, and the trackers begin a new run"
    found = read_json(path, RunDirectoryError, fix)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise RunDirectoryError(f"{path} is {shown(found)}, expected the id of the run at each tracker ({fix})")
    return found


def _remember(run: RunDirectory, tracker: str, name: str) -> None:
    write_text(run.path / TRACKING, json.dumps(known_runs(run) | {tracker: name}))


class WandbSink:
    """Writes the rows of a run to W&B, where iterations are steps.

    Args:
        session: the run of W&B.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def write(self, row: Mapping[str, float]) -> None:
        """Write a row. After a resume W&B ignores the rows that it has already, which are the same."""
        self._session.log(dict(row), step=int(row["iteration"]), commit=True)


@contextmanager
def _wandb(section: WandbConfig, run: RunDirectory, config: Mapping[str, Any]) -> Iterator[WandbSink]:
    import wandb
    from ray.air.integrations.wandb import setup_wandb

    name = known_runs(run).get("wandb") or uuid.uuid4().hex[:12]
    place = {"project": section.project, "group": section.group, "dir": str(run.path)}
    quiet = wandb.Settings(silent=True, console="off")  # the display of the run needs the terminal
    try:
        session = setup_wandb(dict(config), trial_id=name, trial_name=run.path.name, settings=quiet, **place)
    except (ValueError, wandb.Error) as error:
        fix = "set WANDB_API_KEY, or WANDB_MODE=offline"
        raise ConfigError([f"tracking.wandb: {_first_line(error)} ({fix})"]) from error
    _remember(run, "wandb", name)
    status = 1
    try:
        yield WandbSink(session)
        status = 0
    finally:
        session.finish(exit_code=status)


class MlflowSink:
    """Writes the rows of a run to MLflow, where iterations are steps.

    Args:
        client: the module of MLflow.
        name: the id of the run at MLflow.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    def write(self, row: Mapping[str, float]) -> None:
        """Write a row. A server that cannot be reached only causes a warning, because metrics.jsonl has the row too."""
        values = {name: float(value) for name, value in row.items() if name != "iteration"}
        try:
            self._client.log_metrics(values, step=int(row["iteration"]), run_id=self._name)
        except self._client.MlflowException as error:
            log.warning("the row of iteration %d did not reach MLflow: %s", row["iteration"], _first_line(error))


@contextmanager
def _mlflow(section: MlflowConfig, run: RunDirectory, config: Mapping[str, Any]) -> Iterator[MlflowSink]:
    import mlflow
    from ray.air.integrations.mlflow import setup_mlflow

    name = known_runs(run).get("mlflow")
    try:
        if name is None:
            setup_mlflow(
                dict(config),
                tracking_uri=section.tracking_uri,
                experiment_name=section.experiment,
                create_experiment_if_not_exists=True,
                run_name=run.path.name,
            )
            name = mlflow.active_run().info.run_id
            _remember(run, "mlflow", name)
        else:  # the function of Ray would begin a new run
            mlflow.set_tracking_uri(section.tracking_uri)
            mlflow.start_run(run_id=name)
    except mlflow.MlflowException as error:
        mlflow.end_run("FAILED")
        raise ConfigError([f"tracking.mlflow: {_first_line(error)}"]) from error
    status = "FAILED"
    try:
        yield MlflowSink(mlflow, name)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        try:
            mlflow.end_run(status)
        except mlflow.MlflowException as error:
            log.warning("MLflow was not told that the run is %s: %s", status, _first_line(error))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
