"""The held-out curve: paired gains, progress, alarms, and its file."""

import logging
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epd_ray.config.loading import load_config
from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.statistics import paired_difference
from epd_ray.evaluation.validation import Curve, Validation, read_curve, write_curve
from epd_ray.runs import trainer
from epd_ray.runs.held_out import early_end, held_out
from epd_ray.runs.report import write_report
from epd_ray.runs.train import resume, train
from epd_ray.solvers import Solver
from epd_ray.storage.checkpoint import load_newest
from epd_ray.storage.parquet import write_table
from epd_ray.storage.run_directory import read_metrics
from tests.conftest import TINY
from tests.fakes import Quiet
from tests.test_run import rollouts, table

pytestmark = pytest.mark.usefixtures("undrawn")

PROMPTS = 40
SPREAD = np.random.default_rng(0).normal(0, 1, PROMPTS)  # of the prompts: far more than what a table changes


def level(mean, noise, seed):
    return (SPREAD + mean + np.random.default_rng(seed).normal(0, noise, PROMPTS)).astype(np.float32)


def curve(rewards, noise=0.01, trained=("good",), **heads):
    """A curve with these mean rewards, and heads that follow their own."""
    made = Curve(tuple(f"prompt {i}" for i in range(PROMPTS)), tuple(range(PROMPTS)), trained)
    for i, mean in enumerate(rewards):
        scores = {name: level(means[i], noise, 1000 * (1 + j) + i) for j, (name, means) in enumerate(heads.items())}
        reward = level(mean, noise, i)
        made = made.extended(Validation(5 * i, reward, {"good": reward, **scores}))
    return made


def test_the_gain_is_paired():
    metrics = curve([0.0, 0.02]).metrics()
    assert metrics["validation/high"] - metrics["validation/low"] > 0.4  # the prompts' spread
    assert 0.01 < metrics["validation/gain_low"] < metrics["validation/gain"] < metrics["validation/gain_high"] < 0.03
    assert metrics["validation/gain"] == pytest.approx(0.02, abs=0.005)
    assert metrics["validation/good"] == pytest.approx(metrics["validation/reward"])
    assert curve([0.3]).metrics()["validation/gain"] == 0


def test_progress_is_what_noise_cannot_explain():
    up, noise = [0.0, 0.02, 0.04, 0.06], [0.0, 0.001, -0.001, 0.0005]
    assert [curve(up[:n]).stalled for n in (1, 2, 3, 4)] == [0, 0, 0, 0]
    assert [curve(noise[:n], noise=0.02).stalled for n in (1, 2, 3, 4)] == [0, 1, 2, 3]
    slow = curve([0.002 * i for i in range(12)])  # no step counts alone, but they add up
    assert slow.progress > 0 and slow.stalled < 6


@pytest.mark.parametrize(
    ("reward", "watched", "fallen"),
    [
        ([0.0, 0.02], [0.0, -0.02], ["bad"]),  # hacked
        ([0.0, 0.02], [0.0, 0.02], []),  # healthy
        ([0.0, 0.02], [0.0, 0.0], []),
        ([0.0, -0.02], [0.0, -0.02], []),  # worse in everything: no hacking
        ([0.0, 0.0], [0.0, -0.02], []),
    ],
)
def test_a_fall_needs_a_rise(reward, watched, fallen):
    found = curve(reward, bad=watched)
    assert [fall.head for fall in found.falls()] == fallen
    assert found.metrics()["alarm/reward_hacking"] == float(bool(fallen))


def test_trained_heads_raise_no_alarm_and_need_no_metric():
    both = curve([0.0, 0.02], trained=("good", "bad"), bad=[0.0, -0.02])
    assert both.watched == () and both.falls() == [] and "alarm/reward_hacking" not in both.metrics()


def test_the_alarm_sounds_once_an_onset():
    found = curve(
        [0.0, *[0.02] * 5], bad=[0.0, -0.02, -0.02, 0.02, -0.02, -0.02], ugly=[0, 0.01, -0.02, 0.01, 0.01, 0.01]
    )
    heads = [[fall.head for fall in found.onset(i)] for i in range(6)]
    assert heads == [[], ["bad"], ["ugly"], [], ["bad"], []]
    said = found.alarm(1)
    assert said and said.startswith("reward hacking? at iteration 5 the held-out reward is up by +0.0")
    drop = found.head_gain("bad", 1, 0.99)
    assert said.endswith(f"fell: bad {drop.mean:+.4f} [{drop.low:+.4f}, {drop.high:+.4f}]")
    assert found.alarm(5) is None


def test_a_curve_goes_on_and_is_read_as_it_was(tmp_path):
    whole = curve([0.0, 0.02, 0.02, 0.05], bad=[0.0, 0.01, 0.0, 0.0])
    begun = curve([0.0, 0.02, 0.02], bad=[0.0, 0.01, 0.0])
    again = Curve(begun.prompts, begun.seeds, begun.trained).restored(begun.state()).extended(whole.validations[-1])
    assert again.metrics() == whole.metrics() and again.progress == whole.progress == 3
    write_curve(tmp_path / "v.parquet", whole)
    read = read_curve(tmp_path / "v.parquet")
    assert read.metrics() == whole.metrics() and (read.prompts, read.seeds) == (whole.prompts, whole.seeds)
    assert read.watched == ("bad",) and read_curve(tmp_path / "none.parquet") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.replace_schema_metadata({"trained": "[" * 5000}), "cannot be read: it is nested too deeply"),
        (lambda t: t.replace_schema_metadata({"trained": '{"clip": 1}'}), "is {'clip': 1}, expected a list of heads"),
        (lambda t: t.replace_schema_metadata(None), "trained in .* is not valid JSON"),
        (lambda t: t.drop_columns("prompt"), "column 'prompt' is not as expected"),
        (lambda t: t.drop_columns("reward"), "column 'reward' is not as expected"),
        (lambda t: t.append_column("bad2", pa.array(["x"] * len(t))), "column 'bad2' is not as expected"),
        (lambda t: t.append_column("bad2", pa.nulls(len(t), pa.float32())), "column 'bad2' is not as expected"),
        (lambda t: t.slice(0, 0), "it has no rows"),
        (lambda t: t.slice(1), "its validations have different numbers of prompts"),
    ],
)
def test_a_damaged_curve_is_one_line(tmp_path, change, said):
    path = tmp_path / "v.parquet"
    write_table(path, change(curve([0.0, 0.02], bad=[0.0, 0.01]).table()))
    with pytest.raises(RunDirectoryError, match=said) as caught:
        read_curve(path)
    assert str(path) in str(caught.value) and "move it away" in str(caught.value) and "\n" not in str(caught.value)


def test_the_page_says_it():
    found = curve([0.0, 0.03, 0.02], bad=[0.0, 0.0, -0.02])
    rows = [{"iteration": 0, "validation/best": 1.0}, {"iteration": 5, "validation/best": 1.0}, {"iteration": 10}]
    page = held_out(found, rows)
    assert page.iteration == 5 and [(h.head, h.watched) for h in page.heads] == [("good", False), ("bad", True)]
    assert page.heads[0].kept - page.heads[0].start == pytest.approx(page.heads[0].gain.mean, abs=1e-6)
    assert len(page.alarms) == 1 and page.alarms[0].startswith("reward hacking? at iteration 10 ")
    assert held_out(None, rows) is None and held_out(found, []) is None
    assert early_end(rows) is None and early_end([]) is None
    said = early_end([*rows[:2], {"iteration": 10, "stopped/patience": 1.0}])
    assert said == "Fine-tuning ended early, after iteration 10: the held-out reward has stopped getting better."


# -- in a run ---------------------------------------------------------------------------------------------------------

BRIGHT = [
    *TINY,
    "backbone.family=tests.fakes:TableBackbone",
    "distill.enabled=false",
    "rdpo.lr=1e-2",
    "rdpo.staleness=0",
]


def beside(name: str, head: str) -> str:
    """Overrides: brightness is learned from, and another head is only watched."""
    bright = "bright: {head: 'tests.fakes:BrightHead', replicas: 0}"
    return f"rewards={{{bright}, {name}: {{head: 'tests.fakes:{head}', replicas: 0, weight: 0}}}}"


HACKED, HEALTHY = beside("dark", "DarkHead"), beside("too", "BrightHead")


@pytest.fixture(scope="module")
def stalled(small_ray, tmp_path_factory):
    """A head that nothing changes: it never gets better."""
    out = tmp_path_factory.mktemp("stalled") / "run"
    overrides = [*TINY, "rewards={flat: {head: 'tests.fakes:FlatHead', replicas: 0}}", "evaluation.patience=2"]
    train(load_config(None, overrides), out, Quiet())
    return out


def test_a_run_that_stalls_ends_early_and_stays_ended(stalled):
    rows = read_metrics(stalled / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]  # validated at 0, 2 and 4, of 6
    assert [row["validation/stalled"] for row in rows if "validation/stalled" in row] == [0, 1, 2]
    assert rows[-1]["stopped/patience"] == 1 and not any("stopped/patience" in row for row in rows[:-1])
    assert "Fine-tuning ended early, after iteration 4: the held-out" in (stalled / "report.html").read_text()
    before = rollouts(stalled), table(stalled / "solver")
    (stalled / "stages.json").unlink()  # the mark of a finished run
    resume(stalled, Quiet())
    assert read_metrics(stalled / "metrics.jsonl") == rows
    assert (rollouts(stalled), table(stalled / "solver")) == before


def test_anybody_can_redo_the_curve(stalled):
    rows = [row for row in read_metrics(stalled / "metrics.jsonl") if "validation/gain" in row]
    per_prompt = pq.read_table(stalled / "validation.parquet").to_pandas().pivot(index="prompt", columns="iteration")
    for row in rows:
        again = paired_difference(per_prompt["reward"][row["iteration"]], per_prompt["reward"][0])
        assert again.mean == pytest.approx(row["validation/gain"], abs=1e-6)


@pytest.mark.parametrize(("heads", "alarmed"), [(HACKED, True), (HEALTHY, False)])
def test_hacking_a_head_raises_the_alarm_and_health_does_not(small_ray, tmp_path, caplog, heads, alarmed):
    out = tmp_path / "run"
    train(load_config(None, [*BRIGHT, heads]), out, Quiet())
    checks = [row for row in read_metrics(out / "metrics.jsonl") if "validation/gain" in row]
    assert checks[-1]["validation/gain_low"] > 0
    assert checks[-1]["alarm/reward_hacking"] == float(alarmed) and checks[0]["alarm/reward_hacking"] == 0
    said = [r for r in caplog.records if "reward hacking?" in r.message]
    assert len(said) == int(alarmed) and all(r.levelno == logging.WARNING and "dark -0." in r.message for r in said)
    assert ("Reward hacking? at iteration" in write_report(out).read_text()) == alarmed
    assert len(checks) == 4  # it goes on all the same


def test_a_run_may_end_at_the_alarm(small_ray, tmp_path):
    out, config = tmp_path / "run", load_config(None, [*BRIGHT, HACKED, "evaluation.stop_on_alarm=true"])
    train(config, out, Quiet())
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["stopped/alarm"] == rows[-1]["alarm/reward_hacking"] == 1 and rows[-1]["iteration"] < 6
    (out / "stages.json").unlink()  # the mark of a finished run
    resume(out, Quiet())
    assert read_metrics(out / "metrics.jsonl") == rows
    kept = [row["iteration"] for row in rows if row.get("validation/best")][-1]
    assert kept < rows[-1]["iteration"]
    assert Solver.from_pretrained(out / "solver").meta["iteration"] == kept
    assert table(out / "solver") == table(out / "distilled")  # it is hacked from the first validation on


@pytest.mark.parametrize(
    ("watched", "best", "kept"),
    [
        ([0.0, 0.0, -0.02, -0.02], [1, 1, 0, 0], 2),  # the reward rises to the end
        ([0.0, -0.02, -0.02, 0.0], [1, 0, 0, 1], 6),
    ],
)
def test_a_hacked_table_is_not_the_one_to_take_home(small_ray, tmp_path, monkeypatch, caplog, watched, best, kept):
    found = curve([0.0, 0.02, 0.04, 0.06], bad=watched).validations
    monkeypatch.setattr(trainer, "validate", lambda *args: replace(found[args[-1] // 2], iteration=args[-1]))
    config = load_config(
        None, [*TINY, "rewards={good: {head: simulated, replicas: 0}}", f"prompts.validation={PROMPTS}"]
    )
    train(config, tmp_path / "whole", Quiet())
    first = 2 * np.flatnonzero(np.array(watched) < 0)[0]
    (said,) = [r.message for r in caplog.records if "reward hacking?" in r.message]
    assert said.endswith(f"]: the run keeps the solver of iteration {first - 2}")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "again", Quiet(interrupt_after=5))
    resume(tmp_path / "again", Quiet())
    for out in (tmp_path / "whole", tmp_path / "again"):
        rows = [row for row in read_metrics(out / "metrics.jsonl") if "validation/best" in row]
        assert [row["validation/best"] for row in rows] == best
        assert Solver.from_pretrained(out / "solver").meta["iteration"] == kept
        assert load_newest(out / "checkpoints")["best"]["iteration"] == kept
        for path in (out / "checkpoints").glob("iteration-*.pt"):
            path.unlink()
        assert load_newest(out / "checkpoints")["iteration"] == kept  # of best.pt
    assert table(tmp_path / "again" / "solver") == table(tmp_path / "whole" / "solver")
    assert rollouts(tmp_path / "again") == rollouts(tmp_path / "whole")
