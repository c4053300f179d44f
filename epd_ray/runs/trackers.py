"""W&B and MLflow, on request: a run's rows through Ray's own integrations, a sweep's through Ray's own callbacks."""

import importlib.util
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from epd_ray.config.sections import MlflowConfig, TrackingConfig, WandbConfig
from epd_ray.errors import ConfigError
from epd_ray.storage.run_directory import RunDirectory, write_text

log = logging.getLogger(__name__)

TRACKING = "tracking.json"  # in the run directory: what the trackers call the run
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # module -> the smallest package that has it


class Sink(Protocol):
    """Takes the rows of a run's metrics, one per iteration."""

    def write(self, row: Mapping[str, float]) -> None:
        """Finite numbers by name, with "iteration"."""
        ...


def require_trackers(tracking: TrackingConfig) -> None:
    """Check that the packages of the trackers that are asked for are there.

    Raises:
        ConfigError: one is missing.
    """
    asked = [name for name, section in (("wandb", tracking.wandb), ("mlflow", tracking.mlflow)) if section is not None]
    missing = [name for name in asked if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [f"tracking.{n}: the package {n} is not installed: pip install {PACKAGES[n]}" for n in missing]
        )


@contextmanager
def trackers(tracking: TrackingConfig, run: RunDirectory, config: Mapping[str, Any]) -> Iterator[list[Sink]]:
    """Open the trackers that are asked for; a resumed run goes on where it was.

    Args:
        tracking: which, and where.
        run: keeps what they call the run.
        config: of the run, shown beside its metrics.

    Raises:
        ConfigError: a package or a key is missing, or a server refuses.
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
    """Ray's own callbacks for `tune.RunConfig(callbacks=...)`: each trial becomes a run of the trackers asked for.

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


def _known(run: RunDirectory) -> dict[str, str]:
    path = run.path / TRACKING
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _remember(run: RunDirectory, tracker: str, name: str) -> None:
    write_text(run.path / TRACKING, json.dumps(_known(run) | {tracker: name}))


class WandbSink:
    """Rows of a run on W&B, whose steps are the iterations.

    Args:
        session: W&B's run.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def write(self, row: Mapping[str, float]) -> None:
        """A row that W&B has already, from before a resumption, is left out there: it is the same."""
        self._session.log(dict(row), step=int(row["iteration"]), commit=True)


@contextmanager
def _wandb(section: WandbConfig, run: RunDirectory, config: Mapping[str, Any]) -> Iterator[WandbSink]:
    import wandb
    from ray.air.integrations.wandb import setup_wandb

    name = _known(run).get("wandb") or uuid.uuid4().hex[:12]
    place = {"project": section.project, "group": section.group, "dir": str(run.path)}
    quiet = wandb.Settings(silent=True, console="off")  # the terminal belongs to the run's own display
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
    """Rows of a run on MLflow, whose steps are the iterations.

    Args:
        client: MLflow's module.
        name: of the run there.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    def write(self, row: Mapping[str, float]) -> None:
        """A server that is away does not end the run, which has the row in metrics.jsonl."""
        values = {name: float(value) for name, value in row.items() if name != "iteration"}
        try:
            self._client.log_metrics(values, step=int(row["iteration"]), run_id=self._name)
        except self._client.MlflowException as error:
            log.warning("MLflow misses iteration %d: %s", row["iteration"], _first_line(error))


@contextmanager
def _mlflow(section: MlflowConfig, run: RunDirectory, config: Mapping[str, Any]) -> Iterator[MlflowSink]:
    import mlflow
    from ray.air.integrations.mlflow import setup_mlflow

    name = _known(run).get("mlflow")
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
        else:  # Ray's function always begins a new run
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
            log.warning("MLflow does not know that the run is %s: %s", status, _first_line(error))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
