import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import ray
import torch

from epd_ray.actors import cluster
from epd_ray.actors.serving import TOKEN, WAITING, ServedHead, served
from epd_ray.errors import ConfigError, ModelError, PlacementError, RewardError, UnknownNameError
from epd_ray.rewards.http import HttpHead
from epd_ray.rewards.requests import BadRequestError, Limits
from epd_ray.rewards.simulated import SimulatedHead
from tests.test_requests import PIXELS, body


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("raise", "failed with RuntimeError: out of memory"),
        ("nan", "gave 3 values that are not finite"),
        ("count", r"gave shape \(4,\) for 3 images"),
    ],
)
def test_a_failing_head_gives_no_score(how: str, problem: str) -> None:
    with pytest.raises(RewardError, match=problem):
        ServedHead("tests.frail:Broken", {"how": how}, Limits()).answer(body())


def test_a_wrong_request_does_not_reach_the_head() -> None:
    with pytest.raises(BadRequestError, match="format is neither png nor npy"):
        ServedHead("tests.frail:Broken", {"how": "raise"}, Limits()).answer(body(format="gif"))


def test_a_head_that_cannot_be_built_gives_its_own_error() -> None:
    with pytest.raises(ModelError, match="weights\nare missing"):
        ServedHead("tests.frail:Broken", {"how": "build"}, Limits()).ready()
    with pytest.raises(ConfigError, match="options given: wrong"):
        ServedHead("simulated", {"wrong": 1}, Limits()).ready()


def rows_body(rows: object) -> bytes:
    return json.dumps({**json.loads(body()), "rows": rows}).encode()


def test_a_served_head_is_given_the_columns_that_it_reads() -> None:
    head = ServedHead("tests.fakes:LevelHead", {}, Limits())
    assert head.answer(rows_body([{"level": i, "other": "x"} for i in range(3)])) == [0.0, 1.0, 2.0]
    for asked in (body(), rows_body([{"level": 1}, {}, {"level": 2}])):
        with pytest.raises(BadRequestError, match=r"head needs the column 'level'.* name it in the option columns"):
            head.answer(asked)
    assert len(ServedHead("simulated", {}, Limits()).answer(rows_body([{}, {}, {"level": 1}]))) == 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{}], "rows is not a list of 3, as many as images"),
        ({}, "rows is not a list of 3"),
        ([{}, [], {}], r"rows\[1\] is not an object of columns"),
        ([{}, {}, {"a": float("inf")}], r"rows\[2\] holds a number that is not finite"),
        ([{"a": "\ud800"}, {}, {}], r"rows\[0\] holds .* text that is no Unicode"),
        ([{}, {"a": "x" * 100_000}, {}], r"rows\[1\] has more than 100000 characters"),
    ],
)
def test_wrong_rows_are_named(rows: object, said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        ServedHead("simulated", {}, Limits()).answer(rows_body(rows))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def url(small_ray: None) -> Iterator[str]:
    limits = Limits(body_bytes=1 << 20)
    with served("simulated", {"target": 0.25}, port=0, limits=limits) as serving:
        yield serving.url
    assert ray.is_initialized()  # joined, so left as it was


@pytest.mark.parametrize("form", ["png", "npy"])
def test_a_round_trip_changes_no_score(url: str, form: Any) -> None:
    images = torch.from_numpy(PIXELS).float() / 255
    if form == "npy":
        images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = [f"prompt {i}" for i in range(len(images))]
    here = SimulatedHead(target=0.25).score(images, prompts)
    there = HttpHead(url=url, format=form, batch_size=len(images)).score(images, prompts)
    assert torch.equal(here, there)
    parts = HttpHead(url=url, format=form, batch_size=2, concurrency=2).score(images, prompts)
    assert torch.allclose(here, parts, atol=1e-6)


def test_routes(url: str) -> None:
    root = url.removesuffix("/score")
    assert root.startswith("http://127.0.0.1:")
    health = httpx2.get(f"{root}/health")
    assert health.json() == {"status": "ok", "head": "simulated", "model": "simulated"}
    assert httpx2.get(url).status_code == 404 and httpx2.post(f"{root}/other").status_code == 404
    assert httpx2.post(url, content=b"x").json() == {"error": "the body is not JSON"}
    large = httpx2.post(url, content=b" " * (1 << 20) + b"x")
    assert large.status_code == 413 and large.json() == {"error": "the body has more than 1048576 bytes"}


@pytest.mark.parametrize("shape", [(3000, 1), (1, 2048)])
def test_our_head_shows_the_servers_words(url: str, shape: tuple[int, int]) -> None:
    with pytest.raises(RewardError, match=rf"400 .*images\[0\].*{shape[0]} x {shape[1]}"):
        HttpHead(url=url).score(torch.zeros(1, 3, *shape), ["x"])


def test_a_taken_port_is_named(url: str) -> None:
    port = int(url.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port} "), served("simulated", {}, port=port):
        pass


def test_two_heads_are_served_at_once(url: str) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with served("simulated", {"target": 0.75}, port=0) as other:
        there, here = (HttpHead(url=u, format="npy").score(images, ["a", "b"]) for u in (other.url, url))
    assert torch.equal(there, SimulatedHead(target=0.75).score(images, ["a", "b"])) and not torch.equal(there, here)


def test_its_error_comes_through_and_nothing_stays(small_ray: None) -> None:
    before, port = threading.active_count(), free_port()
    for _ in range(2):  # the second one finds the port free
        with (
            pytest.raises(ModelError, match="weights\nare missing"),
            served("tests.frail:Broken", {"how": "build"}, port=port),
        ):
            pass
    assert threading.active_count() == before


@pytest.mark.parametrize(("how", "problem"), [("raise", "RuntimeError: out of memory"), ("nan", "not finite")])
def test_a_failing_head_is_a_500(small_ray: None, how: str, problem: str) -> None:
    with served("tests.frail:Broken", {"how": how}, port=0) as serving:
        answer = httpx2.post(serving.url, content=body())
    error = answer.json()["error"]
    assert answer.status_code == 500 and problem in error and "\n" not in error and "Broken" in error


def test_a_head_whose_process_dies_is_a_503_and_then_scores_again(small_ray: None, tmp_path: Path) -> None:
    options = {"how": "die once", "mark": str(tmp_path / "died")}
    with served("tests.frail:Broken", options, port=0) as serving:
        lost = httpx2.post(serving.url, content=body(), timeout=60)
        assert lost.status_code == 503 and "was lost" in lost.json()["error"]
        assert HttpHead(url=serving.url, timeout=60).score(torch.zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [1.0, 1.0]


def test_a_queue_has_an_end(small_ray: None, tmp_path: Path) -> None:
    gate, statuses = tmp_path / "gate", []

    def post(url: str) -> None:
        statuses.append(httpx2.post(url, content=body(), timeout=60).status_code)

    with served("tests.frail:Broken", {"how": "wait", "mark": str(gate)}, port=0) as serving:
        threads = [threading.Thread(target=post, args=(serving.url,)) for _ in range(WAITING + 6)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 30
        while len(statuses) < 6 and time.monotonic() < end:
            time.sleep(0.05)
        assert statuses == [503] * 6
        assert httpx2.get(serving.url.replace("/score", "/health")).status_code == 200
        gate.touch()
        for thread in threads:
            thread.join()
    assert sorted(statuses) == [200] * WAITING + [503] * 6


def test_a_token_in_the_environment_is_asked_for(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    with served("simulated", {}, port=0) as serving:
        with pytest.raises(RewardError, match="answered 401"):
            HttpHead(url=serving.url).score(torch.zeros(1, 3, 4, 4), ["a"])
        assert httpx2.get(serving.url.replace("/score", "/health")).status_code == 401
        assert HttpHead(url=serving.url, token_env=TOKEN).score(torch.zeros(1, 3, 4, 4), ["a"]).shape == (1,)


def test_nothing_starts_without_a_token_where_others_can_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epd_ray.actors.serving.ray_session", None)
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ConfigError, match=f"0.0.0.0:0 .*{TOKEN}"), served("simulated", {}, host="0.0.0.0", port=0):
        pass
    monkeypatch.setenv(TOKEN, "two words")
    with pytest.raises(ConfigError, match=TOKEN) as caught, served("simulated", {}, port=0):
        pass
    assert "two words" not in str(caught.value)


def test_no_room_is_said(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cluster.require_room
    monkeypatch.setattr("epd_ray.actors.serving.require_room", lambda bundles, _: real(bundles, timeout_s=0.5))
    with (
        pytest.raises(PlacementError, match=r"GPU: 8000 asked, .*2 x 1 CPU, 4000 GPU"),
        served("simulated", {}, port=0, replicas=2, num_gpus=4000),
    ):
        pass


def test_gpus_that_a_server_does_not_ask_for_are_mentioned(
    small_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*asked: object) -> None:
        raise PlacementError("no room")

    monkeypatch.setattr("epd_ray.actors.serving.require_room", full)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    for head, num_gpus in (("tests.frail:Broken", 0.0), ("tests.frail:Broken", 0.5), ("simulated", 0.0)):
        with pytest.raises(PlacementError), served(head, {}, port=0, num_gpus=num_gpus):
            pass
    assert caplog.messages == ["the cluster has 2 GPUs, but actors that ask for none run on CPU cores: set --num-gpus"]


def test_a_misspelt_head_is_named_before_anything_starts() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'simulated'"), served("simulatd", {}):
        pass


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end() -> None:
    port = free_port()
    options = json.dumps({"target": 0.25})
    command = [sys.executable, "-m", "epd_ray.cli", "rewards", "serve", "simulated"]
    process = subprocess.Popen(
        [*command, "--options", options, "--port", str(port), "--replicas", "2"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"serving simulated at http://127.0.0.1:{port}/score (Ctrl-C to stop)\n"
        images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        there = HttpHead(url=f"http://127.0.0.1:{port}/score", format="npy", batch_size=2).score(images, ["x"] * 8)
        assert torch.allclose(there, SimulatedHead(target=0.25).score(images, ["x"] * 8), atol=1e-6)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
