"""Benchmarks that keep what they have measured: sample efficiency, and RDPO against searches."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from epd_ray.bench import cases, efficiency, search
from epd_ray.bench.efficiency import Curve
from epd_ray.bench.kept import kept
from epd_ray.config.loading import load_config
from epd_ray.drawing.sampler import Sampler
from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.statistics import paired_difference
from epd_ray.policy.search import CmaSearch
from epd_ray.solvers import SolverTable
from tests.conftest import SIMULATED
from tests.fakes import drawn

TINY = (
    *(o for o in SIMULATED if "distill" not in o and "intervals" not in o),
    *("prompts.num_train=16", "prompts.validation=4", "prompts.test=6", "distill.prompts=4", "distill.teacher_steps=2"),
)


RUN = load_config(None)


@dataclass(frozen=True)
class Count:
    value: int


def test_a_measurement_is_made_once(tmp_path):
    path = tmp_path / "new" / "one.json"
    assert kept(path, RUN, {"a": 1}, Count, lambda: Count(3)) == Count(3)
    assert kept(path, RUN, {"a": 1}, Count, lambda: pytest.fail("measured again")) == Count(3)


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "one.json"
    kept(path, RUN, {"b": 2}, Count, lambda: Count(3))
    for config, rules, change in (
        (load_config(None, ["rdpo.num_epochs=2"]), {"b": 2}, "run.rdpo.num_epochs was 1, now 2"),
        (load_config(None, ["cluster.images_per_job=4"]), {"b": 2}, "run.cluster.images_per_job was 8, now 4"),
        (RUN, {"b": 3}, "b was 2, now 3"),
    ):
        with pytest.raises(RunDirectoryError, match=rf"one\.json.*\({change}\)"):
            kept(path, config, rules, Count, lambda: Count(4))
    assert json.loads(path.read_text())["measured"] == {"value": 3}


def test_settings_that_decide_nothing_may_differ(tmp_path):
    path = tmp_path / "one.json"
    kept(path, RUN, {}, Count, lambda: Count(3))
    other = ["name=another", "cluster.placement_timeout_s=9", "checkpoint.every=9", "tracking.wandb={}"]
    assert kept(path, load_config(None, other), {}, Count, lambda: pytest.fail("measured again")) == Count(3)


def test_a_key_that_came_later_had_its_default(tmp_path):
    path = tmp_path / "one.json"
    older = RUN.model_dump(mode="json")
    del older["rdpo"]["lr_schedule"], older["cluster"]["feature_gpus"], older["rewards"]["clip"]["backend"]
    path.write_text(json.dumps({"settings": {"run": older}, "measured": {"value": 3}}))
    assert kept(path, RUN, {}, Count, lambda: pytest.fail("measured again")) == Count(3)
    with pytest.raises(RunDirectoryError, match=r"run\.rdpo\.lr_schedule.*'constant'.*'linear'"):
        kept(path, load_config(None, ["rdpo.lr_schedule=linear"]), {}, Count, lambda: Count(4))


def test_what_is_no_measurement_of_this_version_is_said(tmp_path):
    path = tmp_path / "one.json"
    kept(path, RUN, {}, Count, lambda: Count(3))
    settings = json.loads(path.read_text())["settings"]
    gone = {**settings, "run": {**settings["run"], "rdpo": {"no_such_key": 1}}}
    for held in (
        [],
        {"settings": ["rdpo.lr=1e-3"], "measured": {"value": 3}},  # as they once were
        {"settings": settings, "measured": {"count": 3}},
        {"settings": gone, "measured": {"value": 3}},
    ):
        path.write_text(json.dumps(held))
        with pytest.raises(RunDirectoryError, match=r"one\.json"):
            kept(path, RUN, {}, Count, lambda: Count(4))


def test_a_stopped_measurement_leaves_no_file(tmp_path):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "one.json", RUN, {}, Count, stopped)
    assert not list(tmp_path.iterdir())


def test_when_a_curve_reaches_its_target():
    curve = Curve([0, 32, 64, 96], [0.1, 0.5, 0.4, 0.6])
    assert [curve.reached(target) for target in (0.0, 0.45, 0.5, 0.6)] == [0, 32, 32, 96]
    assert curve.reached(0.4, in_a_row=2) == 32
    assert curve.reached(0.5, in_a_row=2) == curve.reached(0.7) == math.inf


def test_how_many_times_fewer():
    times = efficiency._times
    assert (times(640, 160), times(math.inf, 160), times(640, math.inf), times(math.inf, math.inf)) == (
        4,
        math.inf,
        0,
        1,
    )
    assert (times(640, 0), times(0, 640), times(0, 0)) == (20, 0.05, 1)  # the first check is at 32


def test_ratios_are_of_the_seeds_own_images(tmp_path, monkeypatch):
    def curve(config, budget, target):
        where = config.seed + 1
        arm = 1 if config.rdpo.num_epochs == 4 else 4  # those for few images
        images = [0, arm * 32 * where, budget]
        assert target == (None if config.rdpo.lr == 7e-5 else 1.0)
        return Curve(images, [0.0, 1.0, 1.0])

    monkeypatch.setattr(efficiency, "_measured", curve)
    record = efficiency.efficiency(range(3), tmp_path).figures
    assert [record[f"seed_{i}/ours/first"] for i in range(3)] == [32, 64, 96]
    assert record["reference_tuned/first/ours_times_fewer"] == 4
    assert record["budget/ours_times_fewer"] == 3200 / 64


def test_efficiency_goes_on_where_it_was_stopped(tmp_path, monkeypatch, small_ray):
    record = efficiency.efficiency(range(1), tmp_path, TINY, budget=32).figures
    files = sorted(path.name for path in tmp_path.iterdir())
    arms = ("ours", "ours_published_solver", "reference", "reference_tuned")
    assert files == [f"{arm}-seed0.json" for arm in arms]
    held = {name: json.loads((tmp_path / name).read_text()) for name in files}
    assert held[files[0]]["measured"]["images"][:2] == [0, 32]
    starts = {name: file["measured"]["rewards"][0] for name, file in held.items()}
    assert starts[files[1]] == starts[files[2]] == starts[files[3]]
    solvers = [held[name]["settings"]["run"]["solver"] for name in files]
    assert solvers[1] == solvers[2] == solvers[3] != solvers[0]
    assert record["seed_0/ours/distilled_reward"] == starts[files[0]]
    assert record["seed_0/target"] == held[files[2]]["measured"]["rewards"][-1]
    assert record["reference/first/median"] in (0, 32) and record["ours/first/coverage"] == 0

    monkeypatch.setattr(efficiency, "_measured", lambda *args: pytest.fail("measured again"))
    assert efficiency.efficiency(range(1), tmp_path, TINY, budget=32).figures == record
    with pytest.raises(RunDirectoryError, match=r"run.rdpo.num_epochs was 1, now 2"):
        efficiency.efficiency(range(1), tmp_path, (*TINY, "rdpo.num_epochs=2"), budget=32)
    with pytest.raises(RunDirectoryError, match="budget was 32, now 64"):
        efficiency.efficiency(range(1), tmp_path, TINY, budget=64)


def test_search_gives_each_method_the_same_images(tmp_path, monkeypatch, small_ray):
    monkeypatch.setattr(search, "BETWEEN_CHECKS", 32)
    monkeypatch.setattr(search, "CANDIDATES", 4)
    monkeypatch.setattr(search, "RANDOM_CANDIDATES", 8)
    record = search.search(range(1), tmp_path, TINY, problems=["n2"], budget=64).figures
    measured = {path.stem.split("-")[2]: json.loads(path.read_text())["measured"] for path in tmp_path.iterdir()}
    assert sorted(measured) == ["cma", "distilled", "random", "rdpo"]
    for name, found in measured.items():
        assert len(found["test"]) == 6 and record[f"n2/seed_0/{name}"] == pytest.approx(np.mean(found["test"]))
        assert len(found["validation"]) == (1 if name == "distilled" else 3)
        assert found["validation"][0] == measured["distilled"]["validation"][0]
        assert found["images"] == 32 * int(np.argmax(found["validation"]))
        assert record[f"n2/{name}/last_check"] == pytest.approx(found["validation"][-1])
    difference = np.mean(measured["rdpo"]["test"]) - np.mean(measured["cma"]["test"])
    assert record["n2/cma/rdpo_minus_this/mean"] == pytest.approx(difference, abs=1e-6)
    assert record["interval_over"] == "prompts"  # one seed says nothing about others
    over_prompts = paired_difference(measured["rdpo"]["test"], measured["cma"]["test"])
    assert record["n2/cma/rdpo_minus_this/low"] == pytest.approx(over_prompts.low)


def test_what_a_search_found_is_of_its_start(tmp_path, monkeypatch):
    def found(name, config, budget, first):
        return search.Found([[position]], [[1.0]], None, 0, [0.5], [0.5])

    monkeypatch.setattr(search, "_found", found)
    position = 0.25
    search.search(range(1), tmp_path, problems=["n2"])
    monkeypatch.setattr(search, "_found", lambda *args: pytest.fail("searched again"))
    search.search(range(1), tmp_path, problems=["n2"])
    (tmp_path / "search-n2-distilled-seed0.json").unlink()
    monkeypatch.setattr(search, "_found", found)
    position = 0.26
    with pytest.raises(RunDirectoryError, match=r"search-n2-rdpo-seed0\.json.*\(start was '\w+', now '\w+'"):
        search.search(range(1), tmp_path, problems=["n2"])


def test_seeds_are_the_units_of_a_search():
    spread = np.array([-0.1, 0.0, 0.1])  # over the prompts of a seed
    found = search._compared({name: np.add.outer(means, spread) for name, means in (
        ("rdpo", [0.5, 0.7, 0.9]), ("cma", [0.4, 0.6, 0.6])
    )})  # fmt: skip
    interval = stats.ttest_rel([0.5, 0.7, 0.9], [0.4, 0.6, 0.6]).confidence_interval()
    assert found["cma/rdpo_minus_this/mean"] == pytest.approx(1 / 6)
    assert found["cma/rdpo_minus_this/low"] == pytest.approx(interval.low)
    assert found["cma/rdpo_minus_this/high"] == pytest.approx(interval.high)


def test_a_round_draws_the_same_prompts_with_every_table(build):
    drawn = []
    trained = build()

    class Listening:
        def __init__(self, own):
            self.own = own

        def ask(self):
            return self.own.ask()

        def tell(self, rewards):
            drawn.append(rewards)
            self.own.tell(rewards)

    def watch(sampler, prompts, seeds):
        drawn.append((sampler.table, list(prompts), list(seeds)))
        return trained.__class__.sample_scored(trained, sampler, prompts, seeds)

    config = search.load_config(None, SIMULATED)
    own = CmaSearch(trained.mean_table(), 4, 0)
    trained.sample_scored = watch
    search.Rounds(config, [f"prompt {i}" for i in range(9)], trained, Listening(own), 3).advance()
    (table, prompts, seeds), rewards = drawn
    assert prompts == prompts[:3] * 4 and seeds == seeds[:3] * 4 and len(set(prompts)) == 3
    assert torch.equal(table.positions[0], table.positions[2]) and not torch.equal(*table.positions[2:4])
    assert rewards.shape == (4,)


def test_pictures_may_have_tables_of_their_own(build):
    trained = build()
    one = trained.mean_table()
    tables = SolverTable(*(column.repeat(10, 1, 1) for column in (one.positions, one.weights, one.scale_dir)))
    tables.positions[9] *= 0.5
    sampler = Sampler("epd", 3, "x", "x", tables)
    prompts, seeds = ["prompt"] * 10, list(range(10))
    _, images = drawn(trained, sampler, prompts, seeds)
    _, same = drawn(trained, sampler.with_table(one), prompts, seeds)
    assert [np.array_equal(a, b) for a, b in zip(images, same, strict=True)] == [True] * 9 + [False]


def test_the_command_hands_on_seeds_and_folder(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(cases.CASES, "efficiency", lambda seeds="own", folder=None: seen.append((seeds, folder)) or {})
    cases.measured("efficiency", cases.Options(seeds=2, folder=tmp_path))
    cases.measured("efficiency", cases.Options(folder=tmp_path))
    assert seen == [(range(2), tmp_path), ("own", tmp_path)]
