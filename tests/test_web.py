"""The HTTP server, asked over real sockets by those who mean no good."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx2
import pytest

from epd_ray.errors import ConfigError
from epd_ray.report.web import WAITING_BODIES, Answer, Asked, Rules, answering, bound

LARGE = b"x" * (8 << 20)
RULES = Rules(body_bytes=1000, seconds=0.5)


async def echo(asked: Asked) -> Answer:
    """Answers with what it was asked; some paths are special."""
    if asked.path == "/large":
        return Answer(200, LARGE)
    if asked.path == "/fail":
        raise RuntimeError("a secret of the server")
    if asked.path == "/slow":
        await asyncio.sleep(1.5)
    return Answer(200, json.dumps([asked.method, asked.path, asked.body.decode()]).encode())


@contextmanager
def served(rules: Rules = RULES, host: str = "127.0.0.1") -> Iterator[str]:
    with bound(host, 0, rules.token) as listener, answering(listener, host, echo, rules) as url:
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as url:
        yield url


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def said(url: str, sent: bytes) -> bytes:
    """What the server says to these bytes until it closes the connection."""
    answer = b""
    with connect(url) as connection, suppress(ConnectionResetError):  # where it closes before it has read everything
        connection.sendall(sent)
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def test_a_request_is_answered_and_the_connection_stays(url: str) -> None:
    with httpx2.Client(base_url=url) as client:
        assert client.put("/a%20b?c=d", content=b"body").json() == ["PUT", "/a b", "body"]
        time.sleep(2 * RULES.seconds)  # an idle connection outlives no request that is expected, or is opened anew
        assert client.get("/").json() == ["GET", "/", ""]
    assert httpx2.get(f"{url}/slow", timeout=10).json() == ["GET", "/slow", ""]  # the time is for the request alone
    head = httpx2.get(url).headers
    assert head["cache-control"] == "no-store" and "server" not in head


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\nhalf",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nha",
        b"POST / HTTP/1.1\r\nHost: elsewhere\r\nContent-Length: 9\r\n\r\nhalf",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HTTP/1.1\r\nHo",
    ],
)
def test_half_sent_requests_hold_nothing_up_and_end(url: str, sent: bytes) -> None:
    start = time.monotonic()
    with ExitStack() as stack:
        halves = [stack.enter_context(connect(url)) for _ in range(100)]
        for half in halves:
            half.sendall(sent)
        assert httpx2.get(url).status_code == 200
        for half in halves:
            while half.recv(1 << 16):
                pass
    assert time.monotonic() - start < 20 * RULES.seconds


def test_bytes_that_drip_are_not_waited_for(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900\r\n\r\n")
        start = time.monotonic()
        connection.settimeout(0.05)
        answer = b""
        while time.monotonic() - start < 10:
            connection.sendall(b"x")
            try:
                answer = connection.recv(1 << 16)
                break
            except TimeoutError:
                continue
        connection.settimeout(10)
        with suppress(ConnectionResetError):  # bytes that nobody read may be answered so
            while piece := connection.recv(1 << 16):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ") and b"longer than 0.5 s" in answer


def test_who_reads_slowly_gets_everything_and_who_does_not_read_is_dropped(url: str) -> None:
    asked = b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connect(url) as slow, connect(url) as still:
        still.sendall(asked)
        slow.sendall(asked)
        read, start = 0, time.monotonic()
        while read < len(LARGE) and (piece := slow.recv(1 << 18)):
            read += len(piece)
            time.sleep(0.05)
        assert read >= len(LARGE) and time.monotonic() - start > RULES.seconds
        with pytest.raises(ConnectionError):
            while still.recv(1 << 16):
                pass
            raise ConnectionError  # closed in the middle of the answer, if the system says no more


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:1"}, 200),  # another port: one that is forwarded
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "elsewhere.example"}, 403),
        ({"Host": "127.0.0.1.elsewhere.example"}, 403),
        ({"Host": "elsewhere.example#127.0.0.1"}, 403),
        ({"Host": "127.0.0.1@elsewhere.example"}, 403),
        ({"Host": "192.168.0.1"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:5", "Origin": "http://localhost:5"}, 200),
        ({"Host": "localhost:5", "Origin": "http://localhost:6"}, 403),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "https://127.0.0.1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
    ],
)
def test_other_names_and_other_sites_are_refused(url: str, headers: dict[str, str], status: int) -> None:
    answer = httpx2.post(url, content=b"x", headers=headers)
    assert answer.status_code == status
    assert status == 200 or next(iter(set(headers) - ({"Host"} if "Origin" in headers else set()))) in answer.text


@pytest.mark.parametrize("size", [b"-1", b"+5", b"abc", b"1e3", b"5, 6", b"\xb2", b"0x10", b"9" * 30, b"1" * 5000])
def test_a_size_that_is_no_size_is_refused(url: str, size: bytes) -> None:
    answer = said(url, b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: " + size + b"\r\n\r\nbody")
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))


def test_too_large_is_refused_before_and_while_it_comes(url: str) -> None:
    early = said(url, b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1001\r\n\r\n")
    assert early.startswith(b"HTTP/1.1 413 ") and b"more than 1000 bytes" in early
    pieces = httpx2.put(url, content=(b"x" * 100 for _ in range(11)))
    assert pieces.status_code == 413
    assert httpx2.put(url, content=b"x" * 1000).status_code == 200
    assert said(url, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 20_000).startswith(b"HTTP/1.1 400 ")


def test_many_large_requests_at_once_are_sent_away() -> None:
    rules = Rules(body_bytes=100_000, seconds=20.0)
    sent = b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n" + b"x" * 99_000
    with served(rules) as url, ExitStack() as stack:
        for _ in range(WAITING_BODIES):
            stack.enter_context(connect(url)).sendall(sent)
        end = time.monotonic() + 10
        while (status := httpx2.put(url, content=b"x" * 100_000).status_code) == 200 and time.monotonic() < end:
            time.sleep(0.05)
        assert status == 503
        stack.close()
        while (status := httpx2.put(url, content=b"x" * 100_000).status_code) == 503 and time.monotonic() < end:
            time.sleep(0.05)
        assert status == 200


def test_a_token_is_asked_for_if_there_is_one() -> None:
    with served(Rules(body_bytes=1000, token="secret")) as url:
        for sent in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}, {"Authorization": b"\xff"}):
            refused = httpx2.get(url, headers=sent)
            assert refused.status_code == 401 and "secret" not in refused.text
        assert httpx2.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert "secret" not in repr(Rules(1, token="secret"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_can_reach_it_only_with_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="no token: set one"):
        bound(host, 0, "", "set one").close()


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    with served(host=host) as url:
        assert httpx2.get(url).status_code == 200


def test_every_address_is_asked_by_address_or_by_the_machines_name() -> None:
    rules = Rules(body_bytes=1000, token="secret")
    with bound("0.0.0.0", 0, rules.token) as listener, answering(listener, "0.0.0.0", echo, rules) as url:
        url, sent = url.replace("0.0.0.0", "127.0.0.1"), {"Authorization": "Bearer secret"}
        for host, status in (("10.1.2.3:80", 200), (socket.gethostname(), 200), ("elsewhere.example", 403)):
            assert httpx2.get(url, headers=sent | {"Host": host}).status_code == status


def test_addresses_that_cannot_be_used_are_named(url: str) -> None:
    port = int(url.split(":")[2])
    for host, wrong in (("127.0.0.1", port), ("no.such.host.example", 0), ("1" * 70 + ".x", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(ConfigError, match=f"{host}:{wrong} .*--port") as caught:
            bound(host, wrong)
        assert "\n" not in str(caught.value)


def test_the_servers_own_mistakes_are_in_its_log_alone(url: str, caplog: pytest.LogCaptureFixture) -> None:
    answer = httpx2.get(f"{url}/fail")
    assert answer.status_code == 500 and "secret" not in answer.text
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_clients_that_leave_are_no_news(
    url: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for sent in (b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                 b"Content-Length: 50\r\n\r\nhalf", b"\x16\x03\x01 no HTTP\r\n\r\n",
                 b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):  # fmt: skip
        with connect(url) as leaving:
            leaving.sendall(sent)
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))  # a reset
    time.sleep(2.0)
    assert httpx2.get(url).status_code == 200
    assert not [r for r in caplog.records if r.name != "httpx2"] and capfd.readouterr().err == ""


def test_it_ends_while_connections_are_open() -> None:
    before = threading.active_count()
    with served(Rules(body_bytes=1000, seconds=60.0)) as url:
        half, slow = connect(url), connect(url)
        half.sendall(b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\nhalf")
        slow.sendall(b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        time.sleep(0.3)
    assert threading.active_count() == before
    for connection in (half, slow):
        connection.close()
