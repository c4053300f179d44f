"""W&B (offline) and MLflow (files), both for real: what arrives there, what a resumed run adds, what is refused."""

import importlib.util
import json
import time

import pytest

from epd_ray.config.loading import load_config
from epd_ray.config.services import MlflowConfig, TrackingConfig, WandbConfig
from epd_ray.errors import ConfigError, RunDirectoryError
from epd_ray.runs import trackers as module
from epd_ray.runs.trackers import require_trackers, trackers, tune_callbacks
from epd_ray.runs.train import train
from epd_ray.storage.run_directory import RunDirectory, read_metrics
from tests.conftest import TINY
from tests.fakes import Quiet

pytestmark = pytest.mark.usefixtures("undrawn")

CONFIG = {"seed": 3, "rdpo": {"lr": 0.002}}
ROWS = [{"iteration": i, "images": 32, "reward/clip": 0.5 + i / 10} for i in range(4)]


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "my-run", "seed: 3\n")


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield TrackingConfig(mlflow=MlflowConfig(tracking_uri=f"file:{tmp_path}/mlruns", experiment="solvers"))
    mlflow.set_tracking_uri(None)


def found(tracking):
    """The only run of the experiment, and the client to ask about it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking.mlflow.tracking_uri)
    experiment = client.get_experiment_by_name("solvers")
    [one] = client.search_runs([experiment.experiment_id])
    return client, one


def test_mlflow_gets_rows_and_configuration_and_goes_on(run, mlflow):
    with trackers(mlflow, run, CONFIG) as [sink]:
        for row in ROWS[:3]:
            sink.write(row)
    client, one = found(mlflow)
    assert (one.info.run_name, one.info.status) == ("my-run", "FINISHED")
    assert one.data.params == {"seed": "3", "rdpo/lr": "0.002"}
    with trackers(mlflow, run, CONFIG) as [sink]:
        sink.write(ROWS[3])
    client, again = found(mlflow)
    assert again.info.run_id == one.info.run_id
    history = client.get_metric_history(one.info.run_id, "reward/clip")
    assert [(m.step, m.value) for m in history] == [(r["iteration"], r["reward/clip"]) for r in ROWS]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_mlflow_is_told_how_a_run_ended(run, mlflow, error, status):
    with pytest.raises(error), trackers(mlflow, run, CONFIG):
        raise error
    assert found(mlflow)[1].info.status == status


def test_an_mlflow_that_is_away_ends_no_run(run, mlflow, monkeypatch, caplog):
    import mlflow as client

    def away(*arguments, **options):
        raise client.MlflowException("no answer\nfrom the server")

    with trackers(mlflow, run, CONFIG) as [sink]:
        sink.write(ROWS[0])
        with monkeypatch.context() as patch:
            patch.setattr(client, "log_metrics", away)
            sink.write(ROWS[1])
        sink.write(ROWS[2])
        end, _ = client.end_run, monkeypatch.setattr(client, "end_run", away)
    end()
    assert (
        "the row of iteration 1 did not reach MLflow: no answer" in caplog.text
        and "MLflow was not told that the run is FINISHED" in caplog.text
    )
    history = found(mlflow)[0].get_metric_history(found(mlflow)[1].info.run_id, "reward/clip")
    assert [m.step for m in history] == [0, 2]


def test_an_mlflow_that_cannot_be_used_is_one_line(run, tmp_path):
    tracking = TrackingConfig(mlflow=MlflowConfig(tracking_uri=f"nosuch://{tmp_path}"))
    with pytest.raises(ConfigError, match=r"^tracking.mlflow: .*nosuch") as error, trackers(tracking, run, CONFIG):
        pass
    assert "\n" not in str(error.value)


def test_a_run_takes_its_rows_there(small_ray, tmp_path, mlflow):
    place = [f"tracking.mlflow.tracking_uri={mlflow.mlflow.tracking_uri}", "tracking.mlflow.experiment=solvers"]
    train(load_config(None, [*TINY, "rdpo.iterations=2", *place]), tmp_path / "run", Quiet())
    client, one = found(mlflow)
    assert (one.info.run_name, one.info.status) == ("run", "FINISHED")
    assert one.data.params["rdpo/iterations"] == "2" and one.data.params["backbone/family"] == "simulated"
    for name in ("validation/reward", "reward/sim"):
        history = [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, name)]
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert history == [(r["iteration"], r[name]) for r in rows if name in r] and len(history) >= 2


def offline_files(run):
    found = (run.path / "wandb").glob("offline-run-*/run-*.wandb")
    return sorted(found, key=lambda path: path.parent.name)  # -1 comes behind where two begin in the same second


def records(data):
    """The messages in W&B's log: blocks of 32 KiB; parts have checksum, length, kind (1 whole, 2-4 first to last)."""
    place, message = 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield message
            message = b""


def recorded(path):
    """The rows and the configuration in W&B's file of an offline run."""
    from wandb.proto import wandb_internal_pb2

    rows, config = [], {}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if items := record.history.item:
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows, config


def test_wandb_gets_rows_and_configuration_and_goes_on(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = TrackingConfig(wandb=WandbConfig(project="solvers", group="a"))
    for part in (ROWS[:3], ROWS[3:]):
        with trackers(tracking, run, CONFIG) as [sink]:
            for row in part:
                sink.write(row)
    first, second = offline_files(run)
    name = json.loads((run.path / "tracking.json").read_text())["wandb"]
    assert first.name == second.name == f"run-{name}.wandb"
    rows, config = recorded(first)
    assert config["seed"] == 3 and config["rdpo"] == {"lr": 0.002}
    assert [(r["_step"], r["reward/clip"]) for r in rows] == [(i, ROWS[i]["reward/clip"]) for i in range(3)]
    end = time.monotonic() + 30
    while not (again := recorded(second)[0]) and time.monotonic() < end:
        time.sleep(0.2)  # W&B's own process writes the file, and may be late on a busy machine
    assert [(r["_step"], r["reward/clip"]) for r in again] == [(3, ROWS[3]["reward/clip"])]


def test_wandb_without_a_key_is_one_line(run, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    tracking = TrackingConfig(wandb=WandbConfig())
    with (
        pytest.raises(ConfigError, match=r"tracking.wandb: .*WANDB_API_KEY") as error,
        trackers(tracking, run, CONFIG),
    ):
        pass
    assert "\n" not in str(error.value)
    assert not (run.path / "tracking.json").exists()


def test_nothing_asked_nothing_done(run):
    with trackers(TrackingConfig(), run, CONFIG) as sinks:
        assert sinks == []
    assert not (run.path / "tracking.json").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_starts(monkeypatch, name):
    there = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: None if n == name else there(n))
    tracking = load_config(None, ["tracking.wandb={}", "tracking.mlflow={}"]).tracking
    with pytest.raises(ConfigError, match=f"tracking.{name}: .*pip install {name}"):
        require_trackers(tracking)
    require_trackers(TrackingConfig())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tracking.wandb.api_key=sekret", "tracking.wandb: api_key is no setting: .*set WANDB_API_KEY"),
        (
            "tracking.mlflow.tracking_token=sekret",
            "tracking.mlflow: tracking_token is no setting: .*MLFLOW_TRACKING_TOKEN",
        ),
        (
            "tracking.mlflow.tracking_uri=http://me:sekret@there",
            "tracking.mlflow.tracking_uri: holds a login or token",
        ),
        ("tracking.wandb.projekt=x", "tracking.wandb.projekt: unknown key; did you mean 'project'"),
    ],
)
def test_keys_come_from_the_environment_alone(override, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_config(None, [override])
    assert "sekret" not in str(error.value)


def test_one_key_turns_a_tracker_on():
    tracking = load_config(None, ["tracking.wandb.project=mine"]).tracking
    assert tracking == TrackingConfig(wandb=WandbConfig(project="mine"))
    assert load_config(None).tracking == TrackingConfig()


def test_sweeps_get_rays_own_callbacks(mlflow, monkeypatch):
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.air.integrations.wandb import WandbLoggerCallback

    both = TrackingConfig(wandb=WandbConfig(project="solvers", group="a"), mlflow=mlflow.mlflow)
    wandb, flow = tune_callbacks(both)
    assert isinstance(wandb, WandbLoggerCallback) and (wandb.project, wandb.group) == ("solvers", "a")
    assert isinstance(flow, MLflowLoggerCallback) and flow.experiment_name == "solvers"
    assert tune_callbacks(TrackingConfig()) == []


@pytest.mark.parametrize("saved", ["[" * 5000, "5", '{"mlflow": 5}', '{"mlflow": "a", "mlflow": "b"}', "\udcff"])
def test_damaged_ids_are_one_line_before_a_run_begins_there(run, mlflow, saved):
    (run.path / module.TRACKING).write_bytes(saved.encode(errors="surrogateescape"))
    with pytest.raises(RunDirectoryError, match=r"tracking\.json .*delete it") as caught, trackers(mlflow, run, CONFIG):
        pass
    assert "\n" not in str(caught.value)
