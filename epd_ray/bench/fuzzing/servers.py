"""Kinds of requests over HTTP, whole with their first lines: to the reward server and to that of a comparison page."""

import base64
import io
import json
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from epd_ray.bench.fuzzing.documents import PAGE_KEY, votes_of
from epd_ray.bench.fuzzing.files import png
from epd_ray.bench.fuzzing.importer import Importer
from epd_ray.errors import EpdRayError
from epd_ray.evaluation.ab.records import KEY, PAGE, parse_votes
from epd_ray.evaluation.ab.server import served_page
from epd_ray.rewards.requests import Limits, read_request
from epd_ray.rewards.simulated import SimulatedHead

WAIT_SECONDS = 4.0  # for the next bytes of an answer; shorter than the deadline of a document
LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
HOST = "fuzzed"  # stands for the server's name in a document, because its port is known only when it runs


class Refused(EpdRayError):
    """The server refused a request, or closed the connection without an answer, as for what is no HTTP."""


class Server:
    """A server that is sent documents as they are, each over a connection of its own.

    Args:
        start: starts the server until the end of a block; yields a URL on it.
    """

    def __init__(self, start: Callable[[], AbstractContextManager[str]]) -> None:
        self._start = start
        self._address = ("", 0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the server until the end of the block."""
        with self._start() as url:
            found = urlsplit(url)
            self._address = (str(found.hostname), found.port or 0)
            yield

    def answer(self, path: Path) -> bytes:
        """The body of the answer to the request in a file.

        Raises:
            Refused: the server refused the request.
            RuntimeError: it answered that it failed.
            TimeoutError: it neither answered nor closed the connection.
        """
        name = ":".join(map(str, self._address)).encode()
        head, body = self._exchange(path.read_bytes().replace(HOST.encode(), name))
        status = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        if status is None:
            raise Refused("the server closed the connection")
        code = int(status[1])
        if code >= 500:
            raise RuntimeError(f"status {code}: {body[:200]!r}")
        if code >= 400:
            raise Refused(f"status {code}: {body.decode()}")
        return body

    def _exchange(self, data: bytes) -> tuple[bytes, bytes]:
        """Send a request; the head and body of the answer, both empty where there is none."""
        found = b""
        with socket.create_connection(self._address, WAIT_SECONDS) as connection:
            try:
                connection.sendall(data)
                if not _is_whole(data):
                    connection.shutdown(socket.SHUT_WR)  # the server would wait for the rest until its own deadline
                while not (_is_whole(found) and found):
                    if not (piece := connection.recv(1 << 16)):
                        break
                    found += piece
            except (ConnectionResetError, BrokenPipeError):  # closed before all was read, maybe after an answer
                pass
        head, _, body = found.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        return head, body[: int(length[1]) if length else None]  # without the answer to what followed the request


def _is_whole(message: bytes) -> bool:
    """Whether a request or an answer has its first lines, and as many bytes after them as they say."""
    head, blank, body = message.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    return bool(blank) and (length is None or len(body) >= int(length[1]))


def _request(method: str, path: str, body: bytes) -> bytes:
    lines = (
        f"{method} {path} HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json",
        f"Content-Length: {len(body)}", "Connection: close",
    )  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# -- the reward server ------------------------------------------------------------------------------------------------


def _images(numbers: list[int]) -> tuple[bytes, list[float]]:
    """The body of a request with one or two equal pictures, and their scores by SimulatedHead."""
    data, count = png(numbers), 1 + numbers[2] % 2
    prompts = [f"a red circle {n}" for n in range(count)]
    pixels = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]), np.float32).transpose(2, 0, 1) / 255
    array = io.BytesIO()
    np.save(array, pixels, allow_pickle=False)
    form, file = [("png", data), ("npy", array.getvalue())][numbers[3] % 2]
    body = {"images": [base64.b64encode(file).decode()] * count, "format": form, "prompts": prompts}
    brightness = pixels.mean(dtype=np.float64)
    return json.dumps(body).encode(), [round(-abs(float(brightness) - SimulatedHead().target), 5)] * count


def _body(numbers: list[int]) -> tuple[bytes, Any]:
    body, scores = _images(numbers)
    return body, (len(scores), [f"a red circle {n}" for n in range(len(scores))])


def _to_score(numbers: list[int]) -> tuple[bytes, Any]:
    body, scores = _images(numbers)
    return _request("POST", "/score", body), scores


def _scores(answer: bytes) -> list[float]:
    return [round(score, 5) for score in json.loads(answer)["scores"]] if answer.startswith(b'{"scores"') else []


def _are_scores(answer: bytes, path: Path) -> bool:
    """Whether an answer has a score for each picture, within what SimulatedHead gives, or is that of GET /health."""
    scores = _scores(answer)
    return b'"status"' in answer or (len(scores) > 0 and all(-0.5 <= score <= 0 for score in scores))


@contextmanager
def _reward_server() -> Iterator[str]:
    from epd_ray.actors.serving import served  # here, because it imports Ray

    with served("simulated", {}, port=0) as serving:
        yield serving.url


# -- the server of a comparison page ----------------------------------------------------------------------------------


@contextmanager
def _page_server() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, KEY).write_text(PAGE_KEY.model_dump_json(), encoding="utf-8")
        Path(folder, PAGE).write_text("<!doctype html>", encoding="utf-8")
        with served_page(Path(folder), 0) as url:
            yield url


def _to_save(numbers: list[int]) -> tuple[bytes, Any]:
    votes = votes_of(numbers)
    return _request("PUT", "/results", json.dumps(votes).encode()), votes


def _save(path: Path) -> Any:
    """The votes that the server has after a request."""
    PAGE_SERVER.answer(path)
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "asked")
        asked.write_bytes(_request("GET", "/results", b""))
        return json.loads(PAGE_SERVER.answer(asked))


def _are_votes(found: Any, path: Path) -> bool:
    return found is None or len(parse_votes(json.dumps(found).encode(), PAGE_KEY, "").votes) == len(found["votes"])


REWARD_SERVER, PAGE_SERVER = Server(_reward_server), Server(_page_server)

SERVERS = {
    "reward request": Importer(
        _body, lambda path: read_request(path.read_bytes(), Limits()), "body.json",
        lambda found: (len(found.images), found.prompts),
        holds=lambda found, _: len(found.images) == len(found.prompts) and bool(0 <= found.images.min() <= 1),
    ),
    "page over HTTP": Importer(_to_save, _save, "put.http", holds=_are_votes, around=PAGE_SERVER.running),
    "rewards over HTTP": Importer(
        _to_score, REWARD_SERVER.answer, "post.http", _scores, holds=_are_scores, around=REWARD_SERVER.running
    ),
}  # fmt: skip
