import errno
import io
import json
import logging
import os
import resource
import signal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from epd_ray.errors import PromptError, RewardError, RunDirectoryError
from epd_ray.prompts.files import read_prompts
from epd_ray.storage import parquet as parquet_files
from epd_ray.storage import rollouts as rollout_files
from epd_ray.storage.rollouts import drop_rollouts, rollout_schema, rollout_table, write_rollouts
from epd_ray.storage.run_directory import MetricsLog, RunDirectory, read_metrics, whole, write_text


def row(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "rollout_id": f"r{index}",
        "group_id": f"g{index // 2}",
        "iteration": 3,
        "prompt": 'a "red" circle, größer',
        "noise_seed": 2**62 + index,
        "action_seed": index,
        "policy_version": 2,
        "action": np.arange(10, dtype=np.float32).reshape(2, 5) + index,
        "positions": np.array([[0.25, 0.75], [0.5, 1.0]], np.float32),
        "weights": np.array([[0.5, 0.5], [0.25, 0.75]], np.float32),
        "scale_dir": None,
        "scale_time": np.full((2, 2), 1.5, np.float32),
        "grid": np.array([0.25, 0.75], np.float32),
        "history": np.array([[1.0], [1.5]], np.float32),
        "guidance": np.array([7.5, 1.0], np.float32),
        "log_prob": -1.5,
        "rewards": {"clip": 0.25 + index, "aesthetic": 5.0},
        "reward": 0.25 + index,
        "advantage": -0.5,
        "generate_seconds": 0.5,
        "score_seconds": 0.25,
        "image": None,
    } | changes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"one\n\n\nfour\n \n", r"line 2: blank.*3 blank in all"),
        (b"one\ntwo\ncaf\xe9\n", "line 3: not UTF-8"),
        ("one\n".encode("utf-16-le"), "line 1: .* byte 1 is zero"),
    ],
)
def test_wrong_prompt_files_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=said):
        read_prompts(path)


def test_absent_prompt_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(PromptError, match="is a directory"):
        read_prompts(tmp_path)


def test_prompts_keep_order_and_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9\r\nb \xe2\x80\xa8 c\r\na caf\xc3\xa9")
    assert read_prompts(path) == ["a café", "b \u2028 c", "a café"]


def test_run_directory_holds_config_and_versions(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "b", "seed: 1\n")
    assert RunDirectory.open(run.path) == run
    assert run.config.read_text() == "seed: 1\n"
    versions = json.loads(run.versions.read_text())
    assert list(versions) == ["python", "ray", "torch", "diffusers", "transformers", "numpy", "epd_ray"]
    assert versions["numpy"] == np.__version__
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "versions.json"]


def test_taken_paths_are_left_alone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "seed: 1\n")
    with pytest.raises(RunDirectoryError, match="holds another run"):
        RunDirectory.create(run.path, "seed: 2\n")
    assert run.config.read_text() == "seed: 1\n"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"not empty.*todo\.txt"):
        RunDirectory.create(tmp_path / "notes", "")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory.create(tmp_path / "notes" / "todo.txt", "")
    with pytest.raises(RunDirectoryError, match="Not a directory"):
        RunDirectory.create(tmp_path / "notes" / "todo.txt" / "run", "")
    assert (tmp_path / "notes" / "todo.txt").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("there", [True, False])
def test_failed_creation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, there: bool
) -> None:
    real = Path.write_text

    def fail_on_config(path: Path, text: str, encoding: str) -> int:
        real(path, text[:3], encoding=encoding)
        if "config" in path.name:
            raise OSError(code, os.strerror(code))
        return len(text)

    monkeypatch.setattr(Path, "write_text", fail_on_config)
    path = tmp_path / "run" if there else tmp_path / "new" / "run"
    if there:
        path.mkdir()
    with pytest.raises(RunDirectoryError, match=rf"cannot write .*config\.yaml: {os.strerror(code)}"):
        RunDirectory.create(path, "seed: 1\n")
    assert list(tmp_path.rglob("*")) == ([path] if there else [])


def test_open_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"config\.yaml and versions\.json"):
        RunDirectory.open(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(RunDirectoryError, match=r": versions\.json missing"):
        RunDirectory.open(tmp_path)
    with pytest.raises(RunDirectoryError, match="not a directory"):
        RunDirectory.open(tmp_path / "absent")


def test_rollouts_come_back(tmp_path: Path) -> None:
    table = rollout_table([row(0), row(1)])
    path = write_rollouts(tmp_path / "rollouts", 3, table)
    assert [found.name for found in path.parent.iterdir()] == ["iteration-000003.parquet"]
    back = pq.read_table(path)
    assert back.equals(table)
    assert back.schema.metadata == {b"schema_version": b"3"}
    assert all(field.metadata[b"description"] for field in back.schema)
    assert back.column("noise_seed").to_pylist() == [2**62, 2**62 + 1]
    assert back.column("action")[1].as_py() == list(range(1, 11))
    assert back.column("weights")[0].as_py() == [0.5, 0.5, 0.25, 0.75]
    assert back.column("scale_dir")[0].as_py() is None and back.column("scale_time")[0].as_py() == [1.5] * 4
    assert back.column("grid")[1].as_py() == [0.25, 0.75] and back.column("history")[1].as_py() == [1.0, 1.5]
    assert back.column("guidance")[1].as_py() == [7.5, 1.0]
    assert back.column("image").null_count == 2
    assert back.flatten().column("rewards.clip").to_pylist() == [0.25, 1.25]
    frame = back.to_pandas()
    assert frame.rewards[0] == {"clip": 0.25, "aesthetic": 5.0}
    assert frame.groupby("group_id").reward.mean().item() == 0.75


def test_pictures_come_back_as_png(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(256, size=(3, 8, 16), dtype=np.uint8)
    path = write_rollouts(tmp_path, 3, rollout_table([row(0, image=picture), row(1)]))
    png, absent = pq.read_table(path).column("image").to_pylist()
    assert absent is None
    assert np.array_equal(np.array(Image.open(io.BytesIO(png), formats=["PNG"])), picture.transpose(1, 2, 0))


@pytest.mark.slow
def test_pandas_duckdb_and_ray_data_read_the_rollouts(small_ray: None, tmp_path: Path) -> None:
    picture = np.zeros((3, 8, 8), np.uint8)
    for iteration in (1, 2, 3):
        rows = [row(4 * iteration + i, iteration=iteration, image=None if i else picture) for i in range(4)]
        write_rollouts(tmp_path, iteration, rollout_table(rows))
    frame = pd.read_parquet(tmp_path).sort_values("noise_seed")
    select = f"select *, rewards.clip as clip from '{tmp_path}/*.parquet' order by noise_seed"
    found = duckdb.sql(select).to_arrow_table().to_pylist()
    data = sorted(ray.data.read_parquet(str(tmp_path)).take_all(), key=lambda taken: taken["noise_seed"])
    assert len(frame) == len(found) == len(data) == 12
    for a, b, c in zip(frame.to_dict("records"), found, data, strict=True):
        assert a["rewards"] == b["rewards"] == c["rewards"] == {"clip": b["clip"], "aesthetic": 5.0}
        for field in rollout_files.ROLLOUT_SCHEMA:
            first, *others = (cells[field.name] for cells in (a, b, c))
            if field.type == rollout_files.NUMBERS and first is not None:
                assert all(np.array_equal(first, np.asarray(other, np.float32)) for other in others), field.name
            else:
                assert all(first == other for other in others), field.name
    best = duckdb.sql(f"select group_id, max(rewards.clip) from '{tmp_path}/*.parquet' group by all order by 2 desc")
    assert best.fetchall()[0] == ("g7", 15.25)


def test_later_iterations_are_dropped(tmp_path: Path) -> None:
    for iteration in (1, 2, 11):
        write_rollouts(tmp_path, iteration, rollout_table([row(iteration, iteration=iteration)]))
    drop_rollouts(tmp_path, after=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"iteration-00000{i}.parquet" for i in (1, 2)]
    drop_rollouts(tmp_path / "absent", after=0)


def test_a_failure_while_writing_leaves_the_earlier_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "first")
    with pytest.raises(ZeroDivisionError), whole(path) as partial:
        partial.write_text("sec")
        raise ZeroDivisionError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_creation_left_is_written_again(tmp_path: Path) -> None:
    for name in ("versions.json", "prompts.json", "origin.json", ".lock", ".config.yaml.tmp"):
        (tmp_path / name).write_text("old")
    run = RunDirectory.create(tmp_path, "seed: 1\n", {"prompts.json": "{}"})
    assert (run.config.read_text(), run.prompts.read_text()) == ("seed: 1\n", "{}")
    assert run.versions.read_text() != "old"


def test_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rollouts(tmp_path, 3, rollout_table([row(0)]))

    def full_disk(table: pa.Table, where: Path, **options: Any) -> None:
        where.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet_files.pq, "write_table", full_disk)
    with pytest.raises(RunDirectoryError, match=r"cannot write .*No space left"):
        write_rollouts(tmp_path, 3, rollout_table([row(0), row(1)]))
    assert list(tmp_path.iterdir()) == [path]
    assert pq.read_table(path).num_rows == 1


@pytest.mark.parametrize(
    ("changes", "head", "said"),
    [
        ({"rewards": {"clip": float("nan"), "aesthetic": 5.0}}, "clip", "nan for prompt 'a"),
        ({"rewards": {"clip": 0.1, "aesthetic": float("inf")}}, "aesthetic", "inf for prompt"),
        ({"rewards": {"clip": 0.1}}, "aesthetic", "but not all"),
        ({"reward": float("nan")}, "mix", "nan for prompt"),
        ({"reward": None}, "mix", "None for prompt"),
        ({"rewards": {"clip": 0.1, "aesthetic": None}}, "aesthetic", "judges the prompt .*, but has no score of some"),
        ({"rewards": {"clip": None, "aesthetic": None}}, "mix", "no head judges the prompt"),
    ],
)
def test_a_wrong_reward_is_an_error(changes: dict[str, Any], head: str, said: str) -> None:
    with pytest.raises(RewardError, match=said) as caught:
        rollout_table([row(0), row(1, **changes)])
    assert (caught.value.head, caught.value.rollout_ids) == (head, ("r1",))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rollouts"),
        ([row(0), row(0)], "r0 appears twice"),
        ([row(0, extra=1)], "extra"),
        ([{name: value for name, value in row(0).items() if name != "prompt"}], "prompt"),
        ([row(0, advantage=float("nan"))], "advantage is nan"),
        ([row(0, action=np.array([[0.5, np.nan]]))], "action is"),
        ([row(0, weights=np.array([[0.5, np.inf]]))], "weights is"),
        ([row(0, scale_time=np.array([[0.5, np.nan]]))], "scale_time is"),
        ([row(0, grid=np.array([0.5, np.nan]))], "grid is"),
        ([row(0, history=np.array([[np.inf], [1.0]]))], "history is"),
        ([row(0, guidance=np.array([np.nan, 1.0]))], "guidance is"),
    ],
)
def test_wrong_rows_are_named(rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rollout_table(rows)


def test_rows_of_another_iteration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"iterations \[3\], expected 4"):
        write_rollouts(tmp_path, 4, rollout_table([row(0)]))


def events(folder: Path) -> list[Event]:
    """The event files' records, in order."""
    found = []
    for file in sorted(folder.iterdir()):
        data, offset = file.read_bytes(), 0
        while offset < len(data):  # length (8), its checksum (4), event, checksum (4)
            length = int.from_bytes(data[offset : offset + 8], "little")
            found.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
            offset += length + 16
    return found


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard would show."""
    return [(value.tag, event.step, value.simple_value) for event in events(folder) for value in event.summary.value]


def test_metrics_reach_both_places(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    with MetricsLog(run) as metrics:
        metrics.write({"iteration": 1, "images": 32, "reward/mean": np.float32(0.5)})
        assert read_metrics(run.metrics) == [{"iteration": 1, "images": 32, "reward/mean": 0.5}]
        metrics.write({"iteration": 2, "reward/mean": 0.75})
        with pytest.raises(ValueError, match=r"losses/policy_loss is nan.* 3"):
            metrics.write({"iteration": 3, "losses/policy_loss": float("nan")})
    assert len(read_metrics(run.metrics)) == 2
    assert scalars(run.tensorboard) == [("images", 1, 32.0), ("reward/mean", 1, 0.5), ("reward/mean", 2, 0.75)]


def test_truncate_forgets_later_rows(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    with MetricsLog(run) as metrics:
        for iteration in (1, 2, 3):
            metrics.write({"iteration": iteration, "reward/mean": float(iteration)})
    with MetricsLog(run, keep_until=1) as metrics:
        metrics.write({"iteration": 2, "reward/mean": 9.0})
    assert [found["reward/mean"] for found in read_metrics(run.metrics)] == [1.0, 9.0]
    restarts = [event.step for event in events(run.tensorboard) if event.session_log.status == SessionLog.START]
    assert restarts == [2]


def test_metrics_on_a_full_disk_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    with MetricsLog(run) as metrics:
        metrics.write({"iteration": 1})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # the disk takes a part of the second row
        try:
            with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl.*File too large"):
                metrics.write({"iteration": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert run.metrics.read_text() == '{"iteration": 1}\n'
        metrics.write({"iteration": 2})
    assert read_metrics(run.metrics) == [{"iteration": 1}, {"iteration": 2}]


def test_a_torn_row_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    assert read_metrics(run.metrics) == []
    run.metrics.write_text('{"iteration": 1}\n{"iteration": 2, "rewa')
    with caplog.at_level(logging.WARNING):
        assert read_metrics(run.metrics) == [{"iteration": 1}]
    assert f"{run.metrics}, line 2: " in caplog.text
    with MetricsLog(run) as metrics:
        metrics.write({"iteration": 2})
    assert read_metrics(run.metrics) == [{"iteration": 1}, {"iteration": 2}]


def test_a_run_that_is_cleared_keeps_its_lock(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "seed: 1\n", {"prompts.json": "{}"})
    run.lock.touch()
    run.checkpoints.mkdir()
    (run.checkpoints / "a.pt").touch()
    run.clear()
    assert [path.name for path in run.path.iterdir()] == [".lock"]


def test_a_reward_is_null_only_where_a_head_does_not_judge_the_prompt() -> None:
    schema = rollout_schema(["a", "b"])
    scores = schema.field("rewards").type
    assert [(scores.field(i).name, scores.field(i).nullable) for i in range(2)] == [("a", True), ("b", True)]
    assert not schema.field("rewards").nullable and not schema.field("reward").nullable
    rows = [row(0, prompt="p", rewards={"a": None, "b": 1.0}), row(1, prompt="q", rewards={"a": 2.0, "b": None})]
    again = {**rows[0], "rollout_id": "r2"}
    assert rollout_table([*rows, again])["rewards"].to_pylist() == [row["rewards"] for row in (*rows, again)]
    with pytest.raises(RewardError, match="'a': judges the prompt 'p', but has no score of some") as caught:
        rollout_table([*rows, {**again, "rewards": {"a": 3.0, "b": 1.0}}])
    assert (caught.value.head, caught.value.rollout_ids) == ("a", ("r0",))
