"""What a run shows in Ray's metrics, and that the Grafana dashboard that ships shows all of it."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from epd_ray.storage.run_directory import read_metrics
from epd_ray.telemetry import monitor as module
from epd_ray.telemetry.memory import Memory
from epd_ray.telemetry.monitor import EXPORTS, Monitor, exported, memory_metrics
from tests.conftest import TINY
from tests.ray_head import ray_head

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "epd_ray" / "telemetry" / "grafana" / "epd_ray_dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
RAYS_OWN = {"ray_node_gram_used"}  # Ray's gauge of its nodes' GPUs


@pytest.mark.parametrize(
    ("key", "metric", "labels"),
    [
        ("reward/mean", "epd_ray_reward_mixed", {}),
        ("reward/clip", "epd_ray_reward", {"head": "clip"}),
        ("reward_std/clip", "epd_ray_reward_std", {"head": "clip"}),
        ("time/learn", "epd_ray_seconds", {"stage": "learn"}),
        ("wait/learner_for_rewards", "epd_ray_wait_seconds", {"who": "learner", "for": "rewards"}),
        ("wait/a_for_b_for_rollouts", "epd_ray_wait_seconds", {"who": "a_for_b", "for": "rollouts"}),
        ("actors/reward/clip", "epd_ray_actors", {"kind": "reward/clip"}),
        ("memory/reward/clip/gpu", "epd_ray_memory_bytes", {"kind": "reward/clip", "device": "gpu"}),
        ("validation/gain_low", "epd_ray_heldout_reward", {"value": "gain_low"}),
        ("alarm/reward_hacking", "epd_ray_alarm", {"kind": "reward_hacking"}),
        ("retries", "epd_ray_retries_total", {}),
        ("something/new", "epd_ray_other", {"name": "something/new"}),
    ],
)
def test_a_rows_key_becomes_a_metric_with_labels(key, metric, labels):
    assert list(exported({key: 2.0})) == [(metric, labels, 2.0)]


def test_memory_is_part_of_a_row():
    row = memory_metrics({"rollout": Memory(10, 20, 30), "reward clip": Memory(5)})
    assert row == {"memory/rollout/host": 10, "memory/rollout/gpu": 20, "memory/reward/clip/host": 5}


class Recorded:
    """Stands in for Ray's Gauge, which nothing can be read back from."""

    values: dict = {}  # noqa: RUF012

    def __init__(self, name, description, tag_keys):
        self._name, self._keys = name, set(tag_keys)

    def set(self, value, tags):
        assert set(tags) == self._keys
        self.values.setdefault((self._name, *sorted(tags.items())), []).append(value)


@pytest.fixture
def gauges(monkeypatch):
    monkeypatch.setattr(module, "Gauge", Recorded)
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.01)
    Recorded.values = {}
    return Recorded.values


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return found


def test_values_are_set_again_until_the_run_ends(gauges):
    reward, held_out = (("epd_ray_" + n, *t, ("run", "a")) for n, t in [("reward", [("head", "x")]), ("staleness", [])])
    with Monitor("a") as monitor:
        monitor.write({"iteration": 1, "reward/x": 0.5, "staleness": 1})
        until(lambda: len(gauges[reward]) > 3)
        monitor.write({"iteration": 2, "reward/x": 0.7})
        until(lambda: gauges[reward][-3:] == [0.7] * 3)
        assert set(gauges[held_out]) == {1.0}  # what a row lacks keeps its last value
    count = len(gauges[reward])
    time.sleep(0.1)
    assert len(gauges[reward]) == count


def metrics_in(expression):
    return set(re.findall(r"\bray_\w+", expression))


def test_the_dashboard_shows_everything_and_nothing_else():
    shown = {name for _, expression, _ in TARGETS for name in metrics_in(expression)}
    assert shown - RAYS_OWN == {f"ray_{export.metric}" for export in EXPORTS}


@pytest.mark.parametrize(
    ("title", "expression", "legend"), TARGETS, ids=[f"{t}-{i}" for i, (t, _, _) in enumerate(TARGETS)]
)
def test_a_panels_query_fits_its_metric(title, expression, legend):
    """Grouped by exactly the labels that the metric has, which the legend shows; filtered by the variables."""
    (name,) = metrics_in(expression)
    query = re.fullmatch(r"max by \(([\w, ]+)\) \((\w+)\{(.+)\}\)( \* 1024 \* 1024)?", expression)
    assert query, expression
    labels, filters = query[1].split(", "), query[3]
    assert 'SessionName=~"$SessionName"' in filters
    if name not in RAYS_OWN:
        [export] = [e for e in EXPORTS if f"ray_{e.metric}" == name]
        assert labels == ["run", *export.labels] and 'run=~"$run"' in filters
        assert set(re.findall(r'(\w+)(?:=|!=|=~|!~)"', filters)) <= {"SessionName", *labels}
    assert set(re.findall(r"{{(\w+)}}", legend)) == set(labels)


def test_the_dashboard_is_one_that_grafana_takes():
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["uid"] and DASHBOARD["title"] == "epd_ray"
    assert "id" not in DASHBOARD  # which belongs to one Grafana's database
    everything = DASHBOARD["panels"]
    assert len({p["id"] for p in everything}) == len(everything)
    assert {p["type"] for p in everything} == {"row", "timeseries", "stat"}
    assert [p["title"] for p in everything if p["type"] == "row"] == ["Throughput", "Rewards", "Overlap", "Cluster"]
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["description"].endswith(".")
        assert [t["refId"] for t in panel["targets"]] == ["A", "B"][: len(panel["targets"])]
        assert all(t["datasource"] == panel["datasource"] for t in panel["targets"])


def test_no_panel_covers_another_or_leaves_the_grid():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    rows = sorted({y for _, y in taken})
    assert rows[0] == 0 and all(b == a + 1 for a, b in pairwise(rows))


def test_the_dashboards_variables_are_all_there_is():
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "SessionName", "run"]  # the order in which they depend on each other
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for name in ("SessionName", "run"):
        variable = variables[name]
        asked = re.fullmatch(r"label_values\(ray_(\w+?)(?:\{.*\})?, (\w+)\)", variable["definition"])
        assert asked and asked[2] == name and asked[1] in {e.metric for e in EXPORTS}
        assert variable["query"]["query"] == variable["definition"] and variable["allValue"] == ".+"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD).replace("$__all", "")))
    assert used == set(variables)


def samples(head, run):
    """A run's samples, (metric, labels) -> value, at the ports that Ray tells Prometheus of; None: no answer."""
    texts = []
    for group in json.loads((head.folder / "prom_metrics_service_discovery.json").read_text()):
        for target in group["targets"]:
            with suppress(OSError):  # the autoscaler's port is the same for all heads of a machine
                texts.append(urllib.request.urlopen(f"http://{target}/metrics", timeout=30).read().decode())
    if not any("ray_node_" in text for text in texts):
        return None
    found = {}
    for name, tags, value in re.findall(r"^ray_(epd_ray_\w+)\{(.*)\} (\S+)$", "\n".join(texts), flags=re.M):
        tags = dict(re.findall(r'(\w+)="(.*?)"', tags))
        [labels] = [export.labels for export in EXPORTS if export.metric == name]
        if tags["run"] == run:
            found[name, *(tags[label] for label in labels)] = float(value)
    return found


def written(rows):
    """Every value that rows had: (metric, labels) -> values."""
    found = {}
    for row in rows:
        for metric, labels, value in exported(row):
            found.setdefault((metric, *labels.values()), []).append(value)
    return found


@pytest.mark.slow
def test_rays_metrics_port_shows_a_runs_rows_while_it_lives(tmp_path):
    with ray_head(env={"PYTHONPATH": str(ROOT)}) as head, (tmp_path / "log").open("w") as log:
        overrides = [*TINY, f"cluster.address={head.address}", "cluster.rollout_actors=1"]
        overrides += ["rdpo.iterations=100000", "evaluation.every=100000", "checkpoint.every=100000"]
        command = [sys.executable, "-m", "epd_ray.cli", "train", *overrides, "--out", str(tmp_path / "watched")]
        run = subprocess.Popen(command, env={**os.environ, **head.env}, stdout=log, stderr=log, cwd=ROOT)
        rows = tmp_path / "watched" / "metrics.jsonl"
        try:

            def shown():
                assert run.poll() is None, (tmp_path / "log").read_text()
                expected = written(read_metrics(rows)[:2])
                found = (samples(head, "watched") if len(expected) > 10 else None) or {}
                return found if expected.keys() <= found.keys() else None

            found = until(shown, 300)
            everything = written(read_metrics(rows))  # later, so that it has all that was published before
            assert all(value == pytest.approx(min(everything[key], key=lambda v: abs(v - value)), rel=1e-9)
                       for key, value in found.items())  # fmt: skip
            assert {"epd_ray_heldout_reward", "epd_ray_memory_bytes", "epd_ray_reward", "epd_ray_seconds"} <= {
                key[0] for key in found
            }
            assert found["epd_ray_reward", "sim"] != 0.0
        finally:
            run.terminate()
            run.wait(120)
        until(lambda: samples(head, "watched") == {}, 120)  # the dead show nothing
