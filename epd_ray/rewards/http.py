"""A reward model that somebody else runs, asked over HTTP."""

import asyncio
import base64
import io
import json
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx2
import numpy as np
import tenacity
import torch
from PIL import Image
from torch import Tensor

from epd_ray.errors import ConfigError, RewardError
from epd_ray.types import FloatArray

SHOWN = 200  # characters of an answer that an error quotes


class HttpHead:
    """Scores from a server; `epd-ray rewards serve` is one.

    The protocol: POST of JSON {"images": [text, ...], "format": "png" or "npy", "prompts": [text, ...]} to the URL, as
    many prompts as images. An image is the base64 of a file: png, 8-bit RGB; npy, NumPy's float32 [3, H, W] in [0, 1],
    which keeps what PNG rounds to 8 bits. The answer is status 200 and JSON {"scores": [number, ...]}, a finite number
    per image, in order. Connections are kept for further requests. 429 and 5xx, lost connections and time-outs are
    tried again, after a growing pause or the answer's Retry-After. Redirects are not followed. Whatever else comes is
    an error, never a score.

    Args:
        url: where to post. It is saved with the run: no password goes into it.
        token_env: name of the environment variable, where the head runs, that holds a token; sent as bearer
            authentication.
        timeout: seconds for one attempt, from the connection to the answer's last byte.
        retries: attempts after the first.
        concurrency: requests at a time.
        batch_size: images per request.
        format: png, or npy where exact values matter more than size.
        max_request_bytes: a larger body is not sent.
        max_response_bytes: of a larger answer no more is read.
    """

    pause, longest_pause = 0.5, 8.0  # seconds before the first retry; then twice as long each time

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
        max_response_bytes: int = 1 << 20,
    ) -> None:
        self._url, self.model_id = _checked(url)
        low = {"timeout": timeout, "max_request_bytes": max_request_bytes, "max_response_bytes": max_response_bytes}
        problems = [
            f"http reward head: {name} is {value}, expected above 0" for name, value in low.items() if value <= 0
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
        self.format, self.max_request_bytes, self.max_response_bytes = format, max_request_bytes, max_response_bytes
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"} | _authorization(token_env)
        self._client = httpx2.AsyncClient(
            timeout=None, follow_redirects=False, headers=headers, limits=httpx2.Limits(max_connections=concurrency)
        )
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="http reward head", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, self._loop, thread, self._client)  # at the process's end, too

    def close(self) -> None:
        """Give up the connections; nothing can be scored any more."""
        self._end()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        starts = range(0, len(images), self.batch_size)
        batches = [(images[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in starts]
        with ThreadPoolExecutor(self.concurrency) as pool:
            parts = list(pool.map(lambda batch: self._batch(*batch), batches))
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts]))

    def _batch(self, images: Tensor, prompts: Sequence[str]) -> FloatArray:
        encode = _png if self.format == "png" else _npy
        files = [base64.b64encode(encode(image)).decode() for image in images]
        body = json.dumps({"images": files, "format": self.format, "prompts": list(prompts)}).encode()
        if len(body) > self.max_request_bytes:
            sizes = f"{len(body)} bytes for {len(images)} images, more than max_request_bytes={self.max_request_bytes}"
            raise RewardError(self.model_id, f"a request would take {sizes}: lower batch_size or raise the bound")
        pauses = tenacity.wait_exponential_jitter(self.pause, self.longest_pause, jitter=self.pause)
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=lambda state: max(pauses(state), _asked_to_wait(state)),
            retry=tenacity.retry_if_exception_type(_PassingError),
            reraise=True,
        )
        try:
            return attempts(self._ask, body, len(images))
        except _PassingError as error:
            raise RewardError(self.model_id, f"{error}, at {self.retries + 1} attempts") from error

    def _ask(self, body: bytes, count: int) -> FloatArray:
        """One attempt.

        Raises:
            _PassingError: worth another attempt.
            RewardError: not worth one.
        """
        try:
            response, answer = asyncio.run_coroutine_threadsafe(self._exchange(body), self._loop).result()
        except TimeoutError:
            raise _PassingError(f"took longer than {self.timeout:g} s") from None
        except httpx2.TransportError as error:
            raise _PassingError(f"lost the connection ({_line(str(error)) or type(error).__name__})") from None
        status = response.status_code
        if status == 429 or status >= 500:
            raise _PassingError(f"answered {status} ({_said(answer)})", response.headers.get("Retry-After", ""))
        if status != 200:
            hint = "redirects are not followed" if 300 <= status < 400 else _said(answer)
            raise RewardError(self.model_id, f"answered {status} ({hint})")
        return self._scores(answer, count)

    async def _exchange(self, body: bytes) -> tuple[httpx2.Response, bytes]:
        """The answer's status and headers, and its body.

        The client's own time-out is between two bytes; a task's can end an attempt wherever the server keeps it.

        Raises:
            TimeoutError: no whole answer in time.
            httpx2.TransportError: no answer at all.
            RewardError: a larger answer than asked for.
        """
        answer = b""
        async with (
            asyncio.timeout(self.timeout),
            self._client.stream("POST", self._url, content=body) as response,
        ):
            async for piece in response.aiter_raw():
                answer += piece
                if len(answer) > self.max_response_bytes:
                    raise RewardError(self.model_id, f"answered with more than {self.max_response_bytes} bytes")
        return response, answer

    def _scores(self, answer: bytes, count: int) -> FloatArray:
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            raise RewardError(self.model_id, f"answered with what is not JSON ({_said(answer)})") from None
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list):
            raise RewardError(self.model_id, f'answered without a list "scores" ({_said(answer)})')
        if len(scores) != count:
            raise RewardError(self.model_id, f"gave {len(scores)} scores for {count} images")
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 3.4e38:
                raise RewardError(self.model_id, f"gave {_line(repr(score))}, which is no finite float32")
        return np.array(scores, np.float32)


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx2.AsyncClient) -> None:
    asyncio.run_coroutine_threadsafe(client.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class _PassingError(Exception):
    """What another attempt may mend; `after` is the answer's Retry-After."""

    def __init__(self, problem: str, after: str = "") -> None:
        super().__init__(problem)
        self.after = float(after) if after.isdecimal() else 0.0


def _asked_to_wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return min(error.after, HttpHead.longest_pause) if isinstance(error, _PassingError) else 0.0


def _checked(url: str) -> tuple[httpx2.URL, str]:
    """The URL, and what of it may be shown: not the query.

    Raises:
        ConfigError: holds a user or password, is not http, or has no host.
    """
    if "@" in url.partition("?")[0]:  # wherever it is: a password with a slash in it reads as host, port and path
        fix = "put the token into an environment variable and name it in token_env (an @ in a path is %40)"
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
    """The header that carries the token, if there is to be one.

    Raises:
        ConfigError: the variable is not set, or holds what no header can; the value is never shown.
    """
    if token_env is None:
        return {}
    token = os.environ.get(token_env, "")
    if not token:
        raise ConfigError([f"http reward head: environment variable {token_env!r} is not set: put the token into it"])
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError([f"http reward head: environment variable {token_env!r} holds no token: expected one word"])
    return {"Authorization": f"Bearer {token}"}


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _npy(image: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, image.float().cpu().numpy(), allow_pickle=False)
    return file.getvalue()


def _said(answer: bytes) -> str:
    return _line(answer[: 4 * SHOWN].decode(errors="replace")) or "nothing"


def _line(text: str) -> str:
    """One printable line of it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:SHOWN]
