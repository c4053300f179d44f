"""Runs that are resumed with other settings than they began with, or whose files were changed."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from epd_ray import cli
from epd_ray.config.deciding import FREE, Change, deciding
from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.config.values import Section
from epd_ray.errors import ConfigError, RunDirectoryError
from epd_ray.rdpo.session import rdpo_config
from epd_ray.runs.report import write_report
from epd_ray.runs.state import read_state, require_state
from epd_ray.runs.train import resume, train
from epd_ray.solvers import Solver
from epd_ray.storage.checkpoint import load_newest
from epd_ray.storage.rollouts import TIMINGS
from epd_ray.storage.run_directory import read_metrics
from tests.conftest import TINY
from tests.fakes import Quiet

pytestmark = pytest.mark.usefixtures("undrawn")

# Every key of the schema, by what a change of it does to a run that has begun. A new key has to be put into one of
# them here; until the code says otherwise, it decides and can be accepted.
ACCEPTED = {
    *("backbone.dtype", "backbone.vae_tiling", "backbone.compile", "backbone.attention", "backbone.options"),
    *("rewards.clip.backend", "rewards.clip.options", "cluster.images_per_job"),
    *("rdpo.iterations", "rdpo.prompts_per_iteration", "rdpo.group_size", "rdpo.same_latent", "rdpo.baseline"),
    *("rdpo.lr", "rdpo.lr_schedule", "rdpo.weight_decay", "rdpo.clip", "rdpo.num_epochs", "rdpo.minibatch_size"),
    *("rdpo.grad_clip", "rdpo.kl_coeff", "rdpo.entropy_coeff"),
    *("evaluation.every", "evaluation.patience", "evaluation.stop_on_alarm", "evaluation.baselines"),
    *("evaluation.equal_evals", "evaluation.tune", "evaluation.tune_images"),
}
REFUSED = {
    *("seed", "backbone.family", "backbone.model", "backbone.revision", "backbone.guidance_scale"),
    *("backbone.resolution", "backbone.max_sequence_length", "rewards.clip.head", "rewards.clip.weight"),
    *("solver.intervals", "solver.points", "solver.start_point", "solver.afs", "solver.order"),
    *("solver.grid", "solver.history", "solver.guidance", "solver.reuse"),
    *("prompts.train", "prompts.num_train", "prompts.validation", "prompts.test", "prompts.two_things"),
    "prompts.heads",
    *("distill.enabled", "distill.table", "distill.method", "distill.prompts", "distill.grid", "distill.lr"),
    *("distill.teacher_steps", "distill.min_weight", "distill.steps", "distill.batch", "distill.scale_range"),
    *("rdpo.concentration", "rdpo.concentration_bound", "rdpo.scale_dir", "rdpo.scale_time", "rdpo.hidden_width"),
    *("rdpo.hidden_depth", "rdpo.normalisation", "rdpo.staleness"),
}
FREELY = {
    *("format", "name", "checkpoint.every", "checkpoint.keep", "store.images", "evaluation.pictures"),
    *("backbone.device", "backbone.offload", "backbone.vae_slicing", "backbone.embedding_cache_mib"),
    *("tracking.wandb", "tracking.mlflow", "rewards.clip.replicas", "rewards.clip.min_replicas"),
    *("rewards.clip.max_replicas", "rewards.clip.num_cpus", "rewards.clip.num_gpus", "rewards.clip.resources"),
    *("cluster.address", "cluster.dashboard", "cluster.placement_timeout_s", "cluster.task_timeout_s"),
    *("cluster.rollout_actors", "cluster.max_rollout_actors", "cluster.rollout_cpus", "cluster.rollout_gpus"),
    *("cluster.rollout_resources", "cluster.encoder_actors", "cluster.encoder_cpus", "cluster.encoder_gpus"),
    *("cluster.encoder_resources", "cluster.feature_gpus", "cluster.learner_actors", "cluster.learner_cpus"),
    *("cluster.learner_gpus", "cluster.env", "cluster.py_modules"),
}


def schema_keys() -> set[str]:
    """Every key of the schema, those of one reward head under the name clip."""
    found = set()
    for name, field in RunConfig.model_fields.items():
        section = RunConfig.model_fields["rewards"].annotation.__args__[1] if name == "rewards" else field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            prefix = "rewards.clip" if name == "rewards" else name
            found |= {f"{prefix}.{key}" for key in section.model_fields}
        else:
            found.add(name)
    return found


def test_every_key_of_the_schema_is_classified() -> None:
    assert schema_keys() == ACCEPTED | REFUSED | FREELY
    assert not (ACCEPTED & REFUSED or ACCEPTED & FREELY or REFUSED & FREELY)
    names = {re.sub(r"^rewards\.clip\.", "rewards.*.", key) for key in FREELY}
    assert names == set(FREE)
    settings = deciding(load_config(None, ["backbone.family=simulated", "backbone.options={size: 8}"]))
    below = {key: [k for k in settings if k == key or k.startswith(f"{key}.")] for key in schema_keys()}
    assert {key for key, found in below.items() if not found} == FREELY
    changed = {key: Change(found[0], 1, 2) for key, found in below.items() if found}
    assert {key for key, change in changed.items() if change.obstacle} == REFUSED


@pytest.fixture(scope="module")
def kept_stop(small_ray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 iterations that was stopped after 3; not to be changed."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(load_config(None, TINY), out, Quiet(interrupt_after=3))
    return out


@pytest.fixture
def stopped(kept_stop: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test that changes it."""
    return Path(shutil.copytree(kept_stop, tmp_path / "run"))


def files_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def edit(run: Path, *replacements: tuple[str, str]) -> None:
    text = (run / "config.yaml").read_text()
    for before, now in replacements:
        assert before in text
        text = text.replace(before, now)
    (run / "config.yaml").write_text(text)


LR = ("\n  lr: 0.001\n", "\n  lr: 0.003\n")
GROUPS = ("\n  group_size: 4\n", "\n  group_size: 8\n")
POINTS = ("\n  points: 3\n", "\n  points: 4\n")


def test_what_decides_and_has_changed_is_refused_by_name(stopped: Path) -> None:
    edit(stopped, LR, GROUPS)
    before = files_of(stopped)
    with pytest.raises(RunDirectoryError) as said:
        resume(stopped, Quiet())
    line = str(said.value)
    assert "\n" not in line and line.startswith(f"{stopped} ")
    assert re.findall(r"([a-z_.]+) was ([\d.]+), now ([\d.]*\d)", line) == [
        ("rdpo.group_size", "4", "8"),
        ("rdpo.lr", "0.001", "0.003"),
    ]
    assert re.findall(r"--accept ([a-z_.]+)", line) == ["rdpo.group_size", "rdpo.lr"]
    with pytest.raises(RunDirectoryError, match=r"began with other settings: rdpo\.lr was 0\.001, now 0\.003\. "):
        resume(stopped, Quiet(), ["rdpo.group_size"])
    assert files_of(stopped) == before


def test_an_accepted_learning_rate_holds_from_there_on(finished, stopped: Path) -> None:
    whole, _ = finished
    edit(stopped, LR)
    expected = table_with_another_rate(stopped)
    resume(stopped, Quiet(), ["rdpo.lr"])
    rates = {row["iteration"]: row.get("losses/learning_rate") for row in read_metrics(stopped / "metrics.jsonl")}
    assert rates == {0: None, **dict.fromkeys((1, 2, 3), 0.001), **dict.fromkeys((4, 5, 6), 0.003)}
    assert load_newest(stopped / "checkpoints")["iteration"] == 6
    assert mean_of_the_policy(stopped) == expected
    # What was drawn by the policies up to the change is the same as in the run that was left alone.
    for iteration in range(1, 7):
        same = rollouts(stopped, iteration) == rollouts(whole, iteration)
        assert same == (iteration <= 5), iteration  # the policy of 4 updates is the first other one; it drew 6
    accepted = {"iteration": 3, "key": "rdpo.lr", "before": 0.001, "now": 0.003}
    assert json.loads((stopped / "origin.json").read_text())["accepted"] == [accepted]
    assert load_newest(stopped / "checkpoints")["origin"]["accepted"] == [accepted]
    page = write_report(stopped).read_text()
    assert "rdpo.lr was 0.001, now 0.003, accepted after iteration 3" in page
    assert "accepted after" not in (whole / "report.html").read_text()


def rollouts(run: Path, iteration: int):
    return pq.read_table(run / "rollouts" / f"iteration-{iteration:06d}.parquet").drop_columns(TIMINGS)


def table_with_another_rate(run: Path) -> list[list[float]]:
    """The policy's mean after three more updates of the run's newest state, by the algorithm alone."""
    config = load_config(None, [*TINY, "rdpo.lr=3e-3"])
    algo = rdpo_config(config, json.loads((run / "prompts.json").read_text())["train"]).build_algo()
    try:
        algo.import_state(load_newest(run / "checkpoints")["algorithm"])
        for _ in range(3):
            algo.train()
        return algo.mean_table().positions.tolist()
    finally:
        algo.stop()


def mean_of_the_policy(run: Path) -> list[list[float]]:
    config = load_config(run / "config.yaml")
    algo = rdpo_config(config, json.loads((run / "prompts.json").read_text())["train"]).build_algo()
    try:
        algo.import_state(load_newest(run / "checkpoints")["algorithm"])
        return algo.mean_table().positions.tolist()
    finally:
        algo.stop()


def test_what_was_accepted_needs_no_second_word_and_may_be_taken_back(stopped: Path) -> None:
    edit(stopped, LR)
    with pytest.raises(KeyboardInterrupt):  # after the next iteration, for which there is a checkpoint
        resume(stopped, Quiet(interrupt_after=1), ["rdpo.lr"])
    (stopped / "checkpoints" / "iteration-000004.pt").unlink()
    with pytest.raises(KeyboardInterrupt):  # from the checkpoint before the change
        resume(stopped, Quiet(interrupt_after=2))
    edit(stopped, LR[::-1])
    with pytest.raises(RunDirectoryError, match=r"rdpo\.lr was 0\.003, now 0\.001\."):
        resume(stopped, Quiet())
    resume(stopped, Quiet(), ["rdpo.lr"])
    taken = json.loads((stopped / "origin.json").read_text())["accepted"]
    assert [(a["iteration"], a["before"], a["now"]) for a in taken] == [(3, 0.001, 0.003), (5, 0.003, 0.001)]


def test_what_cannot_change_is_refused_also_where_it_is_accepted(own_run: Path) -> None:
    edit(own_run, POINTS, LR)
    with pytest.raises(RunDirectoryError) as said:
        resume(own_run, Quiet(), ["solver.points", "rdpo.lr"])
    line = str(said.value)
    assert "solver.points was 3, now 4; rdpo.lr was 0.001, now 0.003. solver.points cannot change" in line
    assert "--accept" not in line and "\n" not in line
    edit(own_run, POINTS[::-1], LR[::-1], ("\n  sim:\n", "\n  other:\n"))
    with pytest.raises(RunDirectoryError) as said:
        resume(own_run, Quiet())
    changed = re.findall(r"([\w.]+) was ('\w+'|absent), now ('\w+'|absent)", str(said.value))
    assert changed == [
        ("rewards.sim.head", "'simulated'", "absent"),
        ("rewards.other.head", "absent", "'simulated'"),
    ]


def test_what_decides_nothing_changes_freely(stopped: Path, finished) -> None:
    edit(stopped, ("\n  keep: 3\n", "\n  keep: 1\n"), ("\n  pictures: 8\n", "\n  pictures: 2\n"))
    edit(stopped, ("\nname: shapes\n", "\nname: mine\n"))
    resume(stopped, Quiet())
    assert [path.name for path in stopped.glob("checkpoints/iteration-*")] == ["iteration-000006.pt"]
    assert solver(stopped) == solver(finished[0])


def solver(run: Path) -> list[list[float]]:
    return Solver.from_pretrained(run / "solver").table.positions.tolist()


def test_the_settings_hold_before_the_first_checkpoint_too(stopped: Path) -> None:
    shutil.rmtree(stopped / "checkpoints")
    edit(stopped, LR)
    with pytest.raises(RunDirectoryError, match=r"rdpo\.lr was 0\.001, now 0\.003\."):
        resume(stopped, Quiet())
    with pytest.raises(KeyboardInterrupt):
        resume(stopped, Quiet(interrupt_after=1), ["rdpo.lr"])
    assert read_metrics(stopped / "metrics.jsonl")[1]["losses/learning_rate"] == 0.003


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prompts_that_were_edited_are_refused(stopped: Path, split: str) -> None:
    prompts = json.loads((stopped / "prompts.json").read_text())
    prompts[split][0] += " and a cat"
    (stopped / "prompts.json").write_text(json.dumps(prompts))
    with pytest.raises(RunDirectoryError, match=rf"prompts\.json:{split} was '\d+ prompts ") as said:
        resume(stopped, Quiet())
    assert ("--accept" in str(said.value)) == (split != "validation")
    for accepted in {"train", "test"} & {split}:
        with pytest.raises(KeyboardInterrupt):
            resume(stopped, Quiet(interrupt_after=1), [f"prompts.json:{accepted}"])


def test_a_start_that_was_edited_is_refused(stopped: Path) -> None:
    file = stopped / "distilled" / "solver.json"
    good = file.read_text()
    file.write_text(good.replace("0.", "0.1", 1))
    with pytest.raises(RunDirectoryError, match=r"distilled/solver\.json cannot change in a run that has begun"):
        resume(stopped, Quiet(), ["distilled/solver.json"])
    file.unlink()
    with pytest.raises(RunDirectoryError, match=r"distilled/solver\.json cannot be read"):
        resume(stopped, Quiet())
    file.write_text(good)
    with pytest.raises(KeyboardInterrupt):
        resume(stopped, Quiet(interrupt_after=1))


def test_a_retry_compares_what_decides_and_takes_the_rest(stopped: Path) -> None:
    other = load_config(None, [*TINY, "rdpo.lr=3e-3", "checkpoint.keep=1"])
    with pytest.raises(RunDirectoryError, match=r"rdpo\.lr was 0\.001, now 0\.003\."):
        train(other, stopped, Quiet(), again=True)
    with pytest.raises(KeyboardInterrupt):
        train(other, stopped, Quiet(interrupt_after=1), again=True, accept=["rdpo.lr"])
    assert load_config(stopped / "config.yaml") == other
    assert [path.name for path in stopped.glob("checkpoints/iteration-*")] == ["iteration-000004.pt"]


@pytest.mark.parametrize("key", ["rdpo.lrr", "cluster.rollout_actors"])
def test_a_key_that_decides_nothing_cannot_be_accepted(stopped: Path, tmp_path: Path, key: str) -> None:
    for begin in (
        lambda: resume(stopped, Quiet(), [key]),
        lambda: train(load_config(None, TINY), tmp_path / "new", Quiet(), again=True, accept=[key]),
    ):
        with pytest.raises(ConfigError, match=rf"--accept {key}: ") as said:
            begin()
        assert ("did you mean 'rdpo.lr'" in str(said.value)) == (key == "rdpo.lrr")
    assert not (tmp_path / "new").exists()
    shown = CliRunner().invoke(cli.app, ["train", "--accept", key])
    assert shown.exit_code == 2 and "--accept is about a run that goes on" in shown.stderr


def test_a_finished_run_says_so_and_starts_nothing(own_run: Path, monkeypatch) -> None:
    def start(*args, **kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("epd_ray.runs.train.algorithm", start)
    before = files_of(own_run)
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["train", "--resume", str(own_run)])
    assert shown.exit_code == 0, shown.output
    assert f"{own_run} is finished" in shown.stderr
    assert shown.stdout.splitlines()[-2:] == [f"report: {own_run}/report.html", f"solver: {own_run}/solver"]
    assert "EPD + RDPO" in shown.stdout
    assert files_of(own_run) == before


def test_a_finished_run_is_extended_by_consent(own_run: Path) -> None:
    edit(own_run, ("\n  iterations: 6\n", "\n  iterations: 8\n"))
    with pytest.raises(RunDirectoryError, match=r"rdpo\.iterations was 6, now 8\."):
        resume(own_run, Quiet())
    with pytest.raises(KeyboardInterrupt):
        resume(own_run, Quiet(interrupt_after=1), ["rdpo.iterations"])
    assert not (own_run / "stages.json").exists()  # so that it does not pass for a finished run
    resume(own_run, Quiet())
    assert [row["iteration"] for row in read_metrics(own_run / "metrics.jsonl")] == list(range(9))
    assert (own_run / "stages.json").is_file()


# -- files that are lost or damaged ------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def drop_row(run: Path, iteration: int) -> None:
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(r for r in rows if json.loads(r)["iteration"] != iteration))


def resumed(run: Path) -> Path:
    (run / "stages.json").unlink()  # the mark of a finished run
    resume(run, Quiet())
    return run


def test_lost_rollouts_are_made_again_from_the_checkpoint_before_them(finished, own_run: Path, caplog) -> None:
    folder = own_run / "rollouts"
    damage(folder / "iteration-000005.parquet")
    (folder / "iteration-000006.parquet").unlink()
    resumed(own_run)
    (said,) = caplog.messages
    assert "rollouts of iterations 5-6 are missing or damaged" in said and said.endswith("checkpoint of iteration 4")
    assert_same(own_run, finished[0])


def test_a_lost_row_of_metrics_is_made_again(finished, own_run: Path, caplog) -> None:
    drop_row(own_run, 3)
    resumed(own_run)
    assert "of iteration 3 are missing" in caplog.text and "the checkpoint of iteration 2" in caplog.text
    assert_same(own_run, finished[0])


def assert_same(run: Path, other: Path) -> None:
    assert [rollouts(run, i) for i in range(1, 7)] == [rollouts(other, i) for i in range(1, 7)]
    rows, expected = (read_metrics(r / "metrics.jsonl") for r in (run, other))
    assert [untimed(row) for row in rows] == [untimed(row) for row in expected]
    assert solver(run) == solver(other)


def untimed(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.split("/")[0] in ("iteration", "reward", "validation")}


def test_what_no_checkpoint_can_give_back_is_said_to_be_lost(finished, own_run: Path, caplog) -> None:
    (own_run / "checkpoints" / "iteration-000002.pt").unlink()
    drop_row(own_run, 1)
    (own_run / "rollouts" / "iteration-000002.parquet").write_bytes(b"")
    (own_run / "rollouts" / "iteration-000004.parquet").unlink()
    resumed(own_run)
    (said,) = caplog.messages
    assert "of iterations 1-2, 4 are missing" in said and "its results do not depend on them" in said
    assert solver(own_run) == solver(finished[0])
    assert [row["iteration"] for row in read_metrics(own_run / "metrics.jsonl")] == [0, 2, 3, 4, 5, 6]


def test_files_of_strangers_are_left_alone_and_named_once(own_run: Path, caplog) -> None:
    strangers = {
        own_run / "rollouts" / "iteration-old.parquet": b"old",
        own_run / "rollouts" / "notes.txt": b"mine",
        own_run / "checkpoints" / "iteration-old.pt": b"old",
        own_run / "checkpoints" / "iteration-99.pt": b"old",
    }
    for path, content in strangers.items():
        path.write_bytes(content)
    (own_run / "checkpoints" / "iteration-000006.pt").unlink()  # so that it is written again
    resumed(own_run)
    (said,) = caplog.messages
    assert "checkpoints/iteration-99.pt and 3 more is no file of the run" in said
    assert {path: path.read_bytes() for path in strangers} == strangers


def test_a_damaged_row_is_left_out_wherever_it_is(own_run: Path, caplog) -> None:
    path = own_run / "metrics.jsonl"
    good = read_metrics(path)
    lines = path.read_text().splitlines()
    damaged = [
        "5",
        "{}",
        '{"iteration": 1.5}',
        '{"iteration": 2, "x": "y"}',
        "[" * 100000,
        '{"iteration": 2, "x": NaN}',
    ]
    path.write_text("\n".join([lines[0], *damaged, *lines[1:], '{"iteration": 7, "rew']))
    assert read_metrics(path) == good
    (said,) = caplog.messages
    assert f"{path}, line 2 and 6 more: " in said


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "prompts.json", "origin.json", "checkpoints/iteration-000006.pt", "validation.parquet"),
        *("rollouts/iteration-000006.parquet", "evaluation.json"),
    ],
)
def test_a_directory_in_the_place_of_a_file_is_named(own_run: Path, name: str) -> None:
    (own_run / name).unlink()
    (own_run / name).mkdir()
    (own_run / "stages.json").unlink()
    with pytest.raises(RunDirectoryError, match=rf"{name}\b.* directory") as said:
        resume(own_run, Quiet())
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just text"])
def test_a_configuration_that_is_none_is_refused(own_run: Path, text: str) -> None:
    (own_run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml (is empty|holds)") as said:
        resume(own_run, Quiet())
    assert len(said.value.problems) == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", "5", '{"train": 1}', '{"train": [1], "validation": [], "test": []}'])
@pytest.mark.parametrize("name", ["prompts.json", "origin.json"])
def test_json_of_other_types_is_named(own_run: Path, name: str, text: str) -> None:
    (own_run / name).write_text(text)
    with pytest.raises(RunDirectoryError, match=rf"{name} cannot be read \(.*put it back") as said:
        resume(own_run, Quiet())
    assert "\n" not in str(said.value)


def without(*keys: str):
    def change(state) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def with_(value, *keys: str):
    def change(state) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(without(key) for key in ("format", "iteration", "algorithm", "best", "curve", "versions", "origin")),
        *(without("algorithm", "rdpo", key) for key in ("iteration", "window", "mixer")),
        *(without("algorithm", "learner", key) for key in ("rl_module", "optimizer")),
        *(with_(5, key) for key in ("algorithm", "best", "curve", "versions", "origin")),
        *(with_("6", key) for key in ("format", "iteration")),
        with_({"x": 1}, "algorithm", "rdpo", "window"),
        with_(torch.tensor([float("nan")]), "best", "positions"),
        with_([{"iteration": 0}], "curve", "validations"),
    ],
)
def test_a_checkpoint_without_a_key_or_of_another_type_counts_as_damaged(own_run: Path, caplog, change) -> None:
    newest = own_run / "checkpoints" / "iteration-000006.pt"
    state = torch.load(newest, weights_only=True)
    change(state)
    torch.save(state, newest)
    found = load_newest(own_run / "checkpoints", require_state)
    assert found["iteration"] == 4
    assert [m.partition(" (")[0] for m in caplog.messages] == ["checkpoint iteration-000006.pt is damaged"]
    with pytest.raises(RunDirectoryError, match=r"iteration-000006\.pt") as said:
        read_state(newest)
    assert "\n" not in str(said.value)


def test_a_state_of_another_shape_is_refused_with_its_checkpoint(own_run: Path) -> None:
    newest = own_run / "checkpoints" / "iteration-000006.pt"
    state = torch.load(newest, weights_only=True)
    state["algorithm"]["learner"]["rl_module"]["default_policy"]["policy.out.bias"] = torch.zeros(5)
    torch.save(state, newest)
    (own_run / "stages.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"checkpoint of iteration 6 in .* does not fit") as said:
        resume(own_run, Quiet())
    assert "\n" not in str(said.value)
