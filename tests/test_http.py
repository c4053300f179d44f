import base64
import contextlib
import gc
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epd_ray.errors import ConfigError, RewardError
from epd_ray.rewards.client import Client
from epd_ray.rewards.http import HttpHead
from epd_ray.rewards.scoring import Scorer

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), np.uint8)).float() / 255
PROMPTS = [f"prompt {i}" for i in range(5)]
Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Server:
    """Answers as told, and keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(asked)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    answer(self, asked)

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Server]]:
    monkeypatch.setattr(Client, "pause", 0.01)
    monkeypatch.setattr(Client, "longest_pause", 0.05)
    servers = []

    def make(answer: Answer) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].http.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return servers[-1]

    yield make
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def send(
    handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def scores(values: list[Any]) -> bytes:
    return json.dumps({"scores": values}).encode()


def decoded(asked: dict[str, Any]) -> list[np.ndarray]:
    files = [io.BytesIO(base64.b64decode(file)) for file in asked["images"]]
    if asked["format"] == "npy":
        return [np.load(file) for file in files]
    return [np.asarray(Image.open(file, formats=["PNG"])).transpose(2, 0, 1) / np.float32(255) for file in files]


def by_prompt(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    time.sleep(0.05 * ("prompt 0" in asked["prompts"]))  # the first batch answers last
    sums = [float(image.sum()) for image in decoded(asked)]
    numbers = [float(prompt.split()[1]) for prompt in asked["prompts"]]
    send(handler, scores([1000 * n + s for n, s in zip(numbers, sums, strict=True)]))


@pytest.mark.parametrize("form", ["png", "npy"])
def test_every_image_gets_its_own_score(serve: Callable[[Answer], Server], form: Any) -> None:
    server = serve(by_prompt)
    found = HttpHead(url=server.url, batch_size=2, format=form).score(IMAGES, PROMPTS)
    expected = [1000 * i + float(image.numpy().sum()) for i, image in enumerate(IMAGES)]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, rel=1e-6)
    assert sorted(len(asked["images"]) for asked in server.asked) == [1, 2, 2]


def test_npy_keeps_what_png_rounds(serve: Callable[[Answer], Server]) -> None:
    server = serve(by_prompt)
    image = torch.full((1, 3, 2, 2), 0.123456789)
    HttpHead(url=server.url, format="npy").score(image, ["prompt 1"])
    HttpHead(url=server.url, format="png").score(image, ["prompt 1"])
    exact, rounded = (decoded(asked)[0] for asked in server.asked)
    assert exact.dtype == np.float32 and np.array_equal(exact, image[0].numpy())
    assert np.array_equal(rounded * 255, np.full((3, 2, 2), 31.0))


def test_scorer_takes_it(serve: Callable[[Answer], Server]) -> None:
    head = HttpHead(url=serve(by_prompt).url)
    values = Scorer("remote", head).score(np.zeros((1, 3, 2, 2), np.uint8), ["prompt 7"], ["r1"])
    assert values.tolist() == [7000.0]


def test_columns_are_sent_where_they_are_asked_for(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda handler, asked: send(handler, scores([row["level"] for row in asked["rows"]])))
    head = HttpHead(url=server.url, columns=["level"], batch_size=2)
    rows = [{"level": i, "other": "x"} for i in range(5)]
    found = Scorer("remote", head).score(np.zeros((5, 3, 2, 2), np.uint8), PROMPTS, PROMPTS, rows)
    assert found.tolist() == [*range(5)]
    assert sorted(row["level"] for asked in server.asked for row in asked["rows"]) == [*range(5)]
    assert {name for asked in server.asked for row in asked["rows"] for name in row} == {"level"}
    head.probe({"level": 3.0})
    old = serve(by_prompt)  # a head without columns asks as it always did
    Scorer("remote", HttpHead(url=old.url)).score(np.zeros((1, 3, 2, 2), np.uint8), ["prompt 1"], ["r"], [{"level": 1}])
    assert set(old.asked[0]) == {"images", "format", "prompts"}


@pytest.mark.parametrize("closed", [True, False])
def test_one_connection_serves_all_requests_and_is_closed_in_the_end(
    serve: Callable[[Answer], Server], closed: bool
) -> None:
    server, connections, ended = serve(failing(1)), set(), threading.Event()

    class Lasting(server.http.RequestHandlerClass):  # type: ignore[name-defined, misc]
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            connections.add(self.client_address)
            super().handle()
            ended.set()

    server.http.RequestHandlerClass = Lasting
    before = threading.active_count()
    head = HttpHead(url=server.url, concurrency=1, batch_size=2)
    for _ in range(2):
        assert head.score(IMAGES, PROMPTS).tolist() == [1.5] * 5
    assert len(server.asked) == 7 and len(connections) == 1 and not ended.is_set()
    if closed:
        head.close()
    del head
    gc.collect()
    assert ended.wait(5.0)
    end = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.01)


def failing(times: int, status: int = 500, headers: dict[str, str] | None = None) -> Answer:
    left = [times]

    def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] >= 0:
            return send(handler, b'{"error": "out of\nmemory"}', status, headers)
        send(handler, scores([1.5] * len(asked["images"])))

    return answer


@pytest.mark.parametrize("status", [500, 503, 429])
def test_two_failures_are_got_over(serve: Callable[[Answer], Server], status: int) -> None:
    server = serve(failing(2, status))
    assert HttpHead(url=server.url, retries=2).score(IMAGES, PROMPTS).tolist() == [1.5] * 5
    assert len(server.asked) == 3


def test_retry_after_is_heeded_within_bounds(
    serve: Callable[[Answer], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "longest_pause", 0.4)
    server, start = serve(failing(1, 429, {"Retry-After": "3600"})), time.monotonic()
    HttpHead(url=server.url).score(IMAGES, PROMPTS)
    assert 0.4 <= time.monotonic() - start < 5


def hang(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    time.sleep(1.0)


def dribble(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def dribble_headers(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    for i in range(200):
        handler.wfile.write(b"X-%d: 1\r\n" % i if i else b"HTTP/1.1 200 OK\r\n")
        handler.wfile.flush()
        time.sleep(0.05)


def close(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    handler.connection.close()


def test_a_probe_lets_the_server_score_one_picture_once(serve: Callable[[Answer], Server]) -> None:
    server = serve(saying(scores([0.5])))
    HttpHead(url=server.url).probe()
    (asked,) = server.asked
    assert len(asked["images"]) == len(asked["prompts"]) == 1
    broken = serve(failing(9))
    with pytest.raises(RewardError, match="answered 500") as caught:
        HttpHead(url=broken.url).probe()
    assert caught.value.head == broken.url and len(broken.asked) == 1


def test_a_probe_waits_for_a_share_of_the_timeout(serve: Callable[[Answer], Server]) -> None:
    head, start = HttpHead(url=serve(dribble_headers).url, timeout=1.0), time.monotonic()  # 10 s
    with pytest.raises(RewardError, match=r"took longer than 0\.4 s: start the server, or change the url"):
        head.probe()
    assert time.monotonic() - start < 5


def saying(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return lambda handler, _: send(handler, body, status, headers)


@pytest.mark.parametrize(
    ("answer", "problem", "requests"),
    [
        (failing(9), r"answered 500 \(\{\"error\": \"out of memory\"\}\), at 2 attempts", 2),
        (hang, "took longer than 0.3 s, at 2 attempts", 2),
        (dribble, "took longer than 0.3 s, at 2 attempts", 2),
        (dribble_headers, "took longer than 0.3 s, at 2 attempts", 2),
        (close, r"lost the connection \(.+\), at 2 attempts", 2),
        (saying(b"", 404), r"answered 404 \(nothing\)", 1),
        (saying(b"", 302, {"Location": "http://127.0.0.1:1/"}), r"answered 302 \(redirects are not followed\)", 1),
        (saying(b"<html>\n\x1b[31mhello"), r"what is not JSON \(<html> \[31mhello\)", 1),
        (saying(b""), r"what is not JSON \(nothing\)", 1),
        (saying(b"[" * 60_000), "what is not JSON", 1),
        (saying(b"[1, 2, 3, 4, 5]"), 'without a list "scores"', 1),
        (saying(b'{"scores": 5}'), 'without a list "scores"', 1),
        (saying(scores([1, 2, 3, 4])), "gave 4 scores for 5 images", 1),
        (saying(scores([1, 2, 3, 4, 5, 6])), "gave 6 scores for 5 images", 1),
        (saying(scores([1, 2, float("nan"), 4, 5])), "gave nan, which is not a finite float32", 1),
        (saying(scores([1, 2, float("-inf"), 4, 5])), "gave -inf, which is not a finite float32", 1),
        (saying(scores([1, 2, 1e39, 4, 5])), r"gave 1e\+39, which is not a finite float32", 1),
        (saying(scores([1, 2, 10**400, 4, 5])), "gave 1000.*, which is not a finite float32", 1),
        (saying(scores([1, 2, None, 4, 5])), "gave None, which is not a finite float32", 1),
        (saying(scores([1, 2, "3", 4, 5])), "gave '3', which is not a finite float32", 1),
        (saying(scores([1, 2, True, 4, 5])), "gave True, which is not a finite float32", 1),
        (saying(b" " * 70_000 + scores([1] * 5)), "answered with more than 65536 bytes", 1),
    ],
)
def test_what_is_no_score_is_an_error(
    serve: Callable[[Answer], Server], answer: Answer, problem: str, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epd_ray.rewards.client.MAX_RESPONSE_BYTES", 65536)
    server = serve(answer)
    timeout = 0.3 if "took longer" in problem else 10.0  # a busy machine takes long to answer at all
    head = HttpHead(url=server.url, retries=1, timeout=timeout)
    with pytest.raises(RewardError, match=f"'{server.url}'.*{problem}") as caught:
        head.score(IMAGES, PROMPTS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert len(server.asked) == requests


def test_an_attempt_ends_in_time_and_leaves_nothing_behind(serve: Callable[[Answer], Server]) -> None:
    left = threading.Event()

    def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        try:
            dribble_headers(handler, asked)  # 10 s
        except OSError:
            left.set()

    head, before = HttpHead(url=serve(answer).url, retries=0, timeout=0.3, concurrency=1), set(threading.enumerate())
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"took longer than 0\.3 s"):
        head.score(IMAGES, PROMPTS)
    assert time.monotonic() - start < 5
    assert left.wait(5.0)  # the connection is closed, not only forgotten
    assert not [t.name for t in set(threading.enumerate()) - before if "process_request" not in t.name]


def test_nobody_there() -> None:
    with contextlib.closing(ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler).socket) as free:
        port = free.getsockname()[1]
    with pytest.raises(RewardError, match="at 1 attempts"):
        HttpHead(url=f"http://127.0.0.1:{port}", retries=0).score(IMAGES, PROMPTS)


def test_as_many_requests_at_a_time_as_asked(serve: Callable[[Answer], Server]) -> None:
    lock, here, most = threading.Lock(), 0, 0

    def slow(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
        time.sleep(0.05)
        with lock:
            here -= 1  # before the answer, which lets the next one come
        send(handler, scores([0.0]))

    server = serve(slow)
    images = torch.zeros(12, 3, 2, 2)
    HttpHead(url=server.url, batch_size=1, concurrency=3).score(images, ["x"] * 12)
    assert most == 3 and len(server.asked) == 12


def test_one_failed_batch_stops_the_others(serve: Callable[[Answer], Server]) -> None:
    server = serve(saying(b"", 404))
    with pytest.raises(RewardError):
        HttpHead(url=server.url, batch_size=1, concurrency=1).score(torch.zeros(20, 3, 2, 2), ["x"] * 20)
    assert len(server.asked) < 5


def test_large_requests_are_not_sent(serve: Callable[[Answer], Server]) -> None:
    server = serve(by_prompt)
    head = HttpHead(url=server.url, max_request_bytes=1000, format="npy")
    with pytest.raises(RewardError, match=r"\b5 images.*max_request_bytes=1000"):
        head.score(IMAGES, PROMPTS)
    assert server.asked == []


def test_the_token_is_sent_and_never_shown(serve: Callable[[Answer], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORES_TOKEN", "secret")
    seen = []

    def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        seen.append((handler.headers["Authorization"], handler.path))
        send(handler, b"", 401)

    url = serve(answer).url
    head = HttpHead(url=url + "?key=hidden", token_env="SCORES_TOKEN")
    assert head.model_id == url
    with pytest.raises(RewardError, match="answered 401") as caught:
        head.score(IMAGES, PROMPTS)
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)
    assert seen == [("Bearer secret", "/score?key=hidden")]


@pytest.mark.parametrize("value", [None, "", "secret\r\nX-Other: 1", "secret ", "s\u00e9cret"])
def test_a_token_that_cannot_be_sent(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCORES_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("SCORES_TOKEN", value)
    with pytest.raises(ConfigError, match="'SCORES_TOKEN'") as caught:
        HttpHead(url="http://host", token_env="SCORES_TOKEN")
    assert "cret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"url": "ftp://host/x"}, "url is 'ftp://host/x', expected http://host:port/path"),
        ({"url": "host/score"}, "expected http://host:port/path"),
        ({"url": "http://me:secret@host/x"}, "environment variable and name it in token_env"),
        ({"url": "http://secret@host/x"}, "environment variable and name it in token_env"),
        ({"url": "http://me:secret/more@host/"}, "environment variable and name it in token_env"),
        ({"url": "http://host:secret/"}, "url cannot be read, expected http://host:port/path"),
        ({"timeout": 0}, "timeout is 0, expected above 0"),
        ({"retries": -1}, "retries is -1, expected 0 or more"),
        ({"concurrency": 0}, "concurrency is 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"format": "jpeg"}, "format is 'jpeg', expected png or npy"),
    ],
)
def test_wrong_options(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        HttpHead(**{"url": "http://host", **options})
    assert "secret" not in str(caught.value)
