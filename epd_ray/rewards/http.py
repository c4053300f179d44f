"""A reward head that sends pictures and prompts to a server over HTTP.

It imports torch where it scores, so that a run's server is probed before the imports that take seconds.
"""

import asyncio
import base64
import io
import json
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import httpx2
import numpy as np
import tenacity
from PIL import Image

from epd_ray.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from torch import Tensor

    from epd_ray.types import FloatArray, ImageArray

MAX_RESPONSE_BYTES = 1 << 20  # scores of a batch take kilobytes: a larger answer is not one
QUOTED = 200  # most characters of an answer that an error message quotes
PROBE_SHARE = 0.4  # of the timeout, in which a probe's small picture is scored; by default 12 of 30 s for a whole batch
GREY = 0.5


class HttpHead:
    """Scores that a server computes, such as one started by `epd-ray rewards serve`.

    The head POSTs JSON {"images": [text, ...], "format": "png" or "npy", "prompts": [text, ...]} with one prompt per
    image. Each image is a file in base64: png holds 8-bit RGB, npy a NumPy array [3, H, W], float32 in [0, 1]. The
    server answers with status 200 and JSON {"scores": [number, ...]}, one finite number per image in the same order.
    Connections are reused. Status 429 or 5xx, lost connections and timeouts are retried after a growing pause, or after
    the answer's Retry-After. Redirects are not followed. Any other answer raises an error.

    Args:
        url: http or https address. It is saved with the run, so it must not contain a password.
        token_env: name of the environment variable that holds a token for bearer authentication, on the machine where
            the head runs; None sends no token.
        timeout: seconds for one attempt, from connecting to the answer's last byte.
        retries: number of attempts after the first one.
        concurrency: largest number of requests at the same time.
        batch_size: number of images per request.
        format: "png", or "npy" for exact pixel values in larger requests.
        max_request_bytes: largest request body; a larger one raises an error.

    Raises:
        ConfigError: an argument is out of its range, or the environment variable holds no token.
    """

    pause, longest_pause = 0.5, 8.0  # seconds before the first retry, doubled before each further one up to the second

    def __init__(
        self,
        *,
        url: str,
        token_env: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        concurrency: int = 4,
        batch_size: int = 8,
        format: Literal["png", "npy"] = "png",
        max_request_bytes: int = 64 << 20,
    ) -> None:
        self._url, self.model_id = _parsed(url)
        sizes = {"timeout": timeout, "max_request_bytes": max_request_bytes}
        problems = [
            f"http reward head: {name} is {value}, expected above 0" for name, value in sizes.items() if value <= 0
        ]
        counts = {"retries": (retries, 0), "concurrency": (concurrency, 1), "batch_size": (batch_size, 1)}
        problems += [
            f"http reward head: {n} is {v}, expected {low} or more" for n, (v, low) in counts.items() if v < low
        ]
        if format not in ("png", "npy"):
            problems.append(f"http reward head: format is {format!r}, expected png or npy")
        if problems:
            raise ConfigError(problems)
        self.timeout, self.retries, self.concurrency, self.batch_size = timeout, retries, concurrency, batch_size
        self.format, self.max_request_bytes = format, max_request_bytes
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"} | _authorization(token_env)
        self._client = httpx2.AsyncClient(
            timeout=None, follow_redirects=False, headers=headers, limits=httpx2.Limits(max_connections=concurrency)
        )
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="http reward head", daemon=True)
        thread.start()
        self._close = weakref.finalize(self, _close, self._loop, thread, self._client)  # also when the process exits

    def close(self) -> None:
        """Close the connections; `score` cannot be called afterwards."""
        self._close()

    def score(self, images: "Tensor", prompts: Sequence[str]) -> "Tensor":
        import torch

        starts = range(0, len(images), self.batch_size)
        batches = [(images[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in starts]
        with ThreadPoolExecutor(self.concurrency) as pool:
            parts = list(pool.map(lambda batch: self._score_batch(*batch), batches))
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts]))

    def probe(self) -> None:
        """Let the server score one grey picture, at one attempt, so that a wrong address is found before a run begins.

        It is given PROBE_SHARE of the timeout.

        Raises:
            RewardError: the server does not answer, or not with one score.
        """
        try:
            self._attempt(self._body([self._grey()], ["a grey square"]), 1, PROBE_SHARE * self.timeout)
        except _TransientError as error:
            raise RewardError(self.model_id, f"{error}: start the server, or change the url") from error

    def _grey(self) -> bytes:
        if self.format == "png":
            return _png(np.full((64, 64, 3), round(255 * GREY), np.uint8))
        return _npy(np.full((3, 64, 64), GREY, np.float32))

    def _file(self, image: "Tensor") -> bytes:
        from epd_ray.rewards.preprocess import to_bytes

        if self.format == "png":
            return _png(np.ascontiguousarray(to_bytes(image).permute(1, 2, 0).numpy()))
        return _npy(image.float().cpu().numpy())

    def _body(self, files: Sequence[bytes], prompts: Sequence[str]) -> bytes:
        images = [base64.b64encode(file).decode() for file in files]
        return json.dumps({"images": images, "format": self.format, "prompts": list(prompts)}).encode()

    def _score_batch(self, images: "Tensor", prompts: Sequence[str]) -> "FloatArray":
        body = self._body([self._file(image) for image in images], prompts)
        if len(body) > self.max_request_bytes:
            sizes = f"{len(body)} bytes for {len(images)} images, more than max_request_bytes={self.max_request_bytes}"
            raise RewardError(self.model_id, f"a request would take {sizes}: lower batch_size or raise the bound")
        growing_pause = tenacity.wait_exponential_jitter(self.pause, self.longest_pause, jitter=self.pause)
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=lambda state: max(growing_pause(state), _retry_after(state)),
            retry=tenacity.retry_if_exception_type(_TransientError),
            reraise=True,
        )
        try:
            return attempts(self._attempt, body, len(images), self.timeout)
        except _TransientError as error:
            raise RewardError(self.model_id, f"{error}, at {self.retries + 1} attempts") from error

    def _attempt(self, body: bytes, count: int, seconds: float) -> "FloatArray":
        """Send one request and read the scores of its `count` images within so many seconds.

        Raises:
            _TransientError: another attempt may succeed.
            RewardError: another attempt would fail, too.
        """
        try:
            response, answer = asyncio.run_coroutine_threadsafe(self._exchange(body, seconds), self._loop).result()
        except TimeoutError:
            raise _TransientError(f"took longer than {seconds:g} s") from None
        except httpx2.TransportError as error:
            raise _TransientError(f"lost the connection ({_line(str(error)) or type(error).__name__})") from None
        status = response.status_code
        if status == 429 or status >= 500:
            raise _TransientError(f"answered {status} ({_quoted(answer)})", response.headers.get("Retry-After", ""))
        if status != 200:
            hint = "redirects are not followed" if 300 <= status < 400 else _quoted(answer)
            raise RewardError(self.model_id, f"answered {status} ({hint})")
        return self._scores(answer, count)

    async def _exchange(self, body: bytes, seconds: float) -> tuple[httpx2.Response, bytes]:
        """The response (status and headers), and its body.

        asyncio.timeout limits the whole attempt; the client's own timeout would only limit the wait for the next bytes.

        Raises:
            TimeoutError: the whole answer did not arrive in time.
            httpx2.TransportError: the connection failed.
            RewardError: the answer is larger than MAX_RESPONSE_BYTES.
        """
        answer = b""
        async with (
            asyncio.timeout(seconds),
            self._client.stream("POST", self._url, content=body) as response,
        ):
            async for piece in response.aiter_raw():
                answer += piece
                if len(answer) > MAX_RESPONSE_BYTES:
                    raise RewardError(self.model_id, f"answered with more than {MAX_RESPONSE_BYTES} bytes")
        return response, answer

    def _scores(self, answer: bytes, count: int) -> "FloatArray":
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            raise RewardError(self.model_id, f"answered with what is not JSON ({_quoted(answer)})") from None
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list):
            raise RewardError(self.model_id, f'answered without a list "scores" ({_quoted(answer)})')
        if len(scores) != count:
            raise RewardError(self.model_id, f"gave {len(scores)} scores for {count} images")
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 3.4e38:
                raise RewardError(self.model_id, f"gave {_line(repr(score))}, which is not a finite float32")
        return np.array(scores, np.float32)


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx2.AsyncClient) -> None:
    asyncio.run_coroutine_threadsafe(client.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class _TransientError(Exception):
    """A failure that another attempt may not have; `after` is the answer's Retry-After in seconds, 0 if it has none."""

    def __init__(self, problem: str, after: str = "") -> None:
        super().__init__(problem)
        self.after = float(after) if after.isdecimal() else 0.0


def _retry_after(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return min(error.after, HttpHead.longest_pause) if isinstance(error, _TransientError) else 0.0


def _parsed(url: str) -> tuple[httpx2.URL, str]:
    """The URL, and its text without the query, which may hold a secret, for error messages.

    Raises:
        ConfigError: the URL holds a user or password, is not http or https, or has no host.
    """
    if "@" in url.partition("?")[0]:  # even in the path, because a password with a slash parses as host, port and path
        fix = "put the token into an environment variable and name it in token_env (write an @ in a path as %40)"
        raise ConfigError([f"http reward head: url holds an @, as in user:password@host: {fix}"])
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise ConfigError(["http reward head: url cannot be read, expected http://host:port/path"]) from None
    shown = str(parsed.copy_with(query=None, fragment=None))
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError([f"http reward head: url is {shown!r}, expected http://host:port/path"])
    return parsed, shown


def _authorization(token_env: str | None) -> dict[str, str]:
    return {} if token_env is None else {"Authorization": f"Bearer {read_token(token_env, 'http reward head')}"}


def read_token(variable: str, who: str) -> str:
    """The token in an environment variable.

    Args:
        variable: the name of the variable.
        who: who needs the token, for the message.

    Raises:
        ConfigError: the variable is not set, or its value cannot stand in a header. The message never shows the value.
    """
    token = os.environ.get(variable, "")
    if not token:
        raise ConfigError([f"{who}: environment variable {variable!r} is not set: put the token into it"])
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError([f"{who}: environment variable {variable!r} holds no token: expected one word"])
    return token


def _png(pixels: "ImageArray") -> bytes:  # [H, W, 3]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _npy(image: "FloatArray") -> bytes:  # [3, H, W]
    file = io.BytesIO()
    np.save(file, image, allow_pickle=False)
    return file.getvalue()


def _quoted(answer: bytes) -> str:
    return _line(answer[: 4 * QUOTED].decode(errors="replace")) or "nothing"


def _line(text: str) -> str:
    """The text in one line, without control characters and at most QUOTED characters long."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:QUOTED]
