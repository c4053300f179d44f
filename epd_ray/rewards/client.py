"""A client of a model server: one JSON request, tried again where another attempt may succeed, and its answer.

The reward heads that ask a server share it. It imports no torch, so that a server is tried before imports that take
seconds.
"""

import asyncio
import io
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import httpx2
import tenacity
from PIL import Image

from epd_ray.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from epd_ray.types import ImageArray

T = TypeVar("T")

MAX_RESPONSE_BYTES = 1 << 20  # scores and short texts take kilobytes: a larger answer is not one
QUOTED = 200  # most characters of an answer that an error message quotes


@dataclass(frozen=True)
class Service:
    """Where a server is, and how it is asked.

    Attributes:
        who: the head that asks, for messages about its options, such as "http reward head".
        url: http or https address. It is saved with the run, so it must not contain a password.
        token_env: name of the environment variable that holds a token for bearer authentication, on the machine where
            the head runs; None sends no token.
        timeout: seconds for one attempt, from connecting to the answer's last byte.
        retries: number of attempts after the first one.
        concurrency: largest number of requests at the same time.
    """

    who: str
    url: str
    token_env: str | None = None
    timeout: float = 30.0
    retries: int = 3
    concurrency: int = 4

    def problems(self, positive: Mapping[str, float], counts: Mapping[str, tuple[int, int]]) -> list[str]:
        """What is wrong with these and further options of a head.

        Args:
            positive: further options that must be above 0, with their values.
            counts: further options with their values and the least that each may be.
        """
        sizes = {"timeout": self.timeout, **positive}
        least = {"retries": (self.retries, 0), "concurrency": (self.concurrency, 1), **counts}
        low = [f"{self.who}: {name} is {value}, expected above 0" for name, value in sizes.items() if value <= 0]
        return low + [
            f"{self.who}: {name} is {value}, expected {bound} or more"
            for name, (value, bound) in least.items()
            if value < bound
        ]


class Client:
    """Sends requests over connections that are reused, from any number of threads.

    Status 429 or 5xx, lost connections and timeouts are retried after a growing pause, or after the answer's
    Retry-After. Redirects are not followed.

    Args:
        service: the server.

    Attributes:
        url: the address without its query, which may hold a secret, for error messages.

    Raises:
        ConfigError: the address is none, or the environment variable holds no token.
    """

    pause, longest_pause = 0.5, 8.0  # seconds before the first retry, doubled before each further one up to the second

    def __init__(self, service: Service) -> None:
        self._address, self.url = _parsed(service.url, service.who)
        self.service = service
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if service.token_env is not None:
            headers["Authorization"] = f"Bearer {read_token(service.token_env, service.who)}"
        limits = httpx2.Limits(max_connections=service.concurrency)
        self._http = httpx2.AsyncClient(timeout=None, follow_redirects=False, headers=headers, limits=limits)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name=service.who, daemon=True)
        thread.start()
        self._close = weakref.finalize(self, _close, self._loop, thread, self._http)  # also when the process exits

    def close(self) -> None:
        """Close the connections; nothing can be asked afterwards."""
        self._close()

    def ask(self, body: bytes, read: Callable[[bytes], T]) -> T:
        """Post a request, and post it again where another attempt may succeed.

        Args:
            body: the JSON.
            read: reads the body of an answer with status 200, and raises RewardError where it is not as expected.

        Raises:
            RewardError: the server does not answer as it should.
        """
        growing_pause = tenacity.wait_exponential_jitter(self.pause, self.longest_pause, jitter=self.pause)
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.service.retries + 1),
            wait=lambda state: max(growing_pause(state), self._retry_after(state)),
            retry=tenacity.retry_if_exception_type(TransientError),
            reraise=True,
        )
        try:
            found: T = attempts(self.ask_once, body, read, self.service.timeout)
            return found
        except TransientError as error:
            raise RewardError(self.url, f"{error}, at {self.service.retries + 1} attempts") from error

    def ask_once(self, body: bytes, read: Callable[[bytes], T], seconds: float) -> T:
        """As `ask`, with one attempt of so many seconds.

        Raises:
            TransientError: another attempt may succeed.
            RewardError: another attempt would fail, too.
        """
        try:
            response, answer = asyncio.run_coroutine_threadsafe(self._exchange(body, seconds), self._loop).result()
        except TimeoutError:
            raise TransientError(f"took longer than {seconds:g} s") from None
        except httpx2.TransportError as error:
            raise TransientError(f"lost the connection ({one_line(str(error)) or type(error).__name__})") from None
        status = response.status_code
        if status == 429 or status >= 500:
            raise TransientError(f"answered {status} ({quoted(answer)})", response.headers.get("Retry-After", ""))
        if status != 200:
            hint = "redirects are not followed" if 300 <= status < 400 else quoted(answer)
            raise RewardError(self.url, f"answered {status} ({hint})")
        return read(answer)

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
            self._http.stream("POST", self._address, content=body) as response,
        ):
            async for piece in response.aiter_raw():
                answer += piece
                if len(answer) > MAX_RESPONSE_BYTES:
                    raise RewardError(self.url, f"answered with more than {MAX_RESPONSE_BYTES} bytes")
        return response, answer

    def _retry_after(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return min(error.after, self.longest_pause) if isinstance(error, TransientError) else 0.0


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx2.AsyncClient) -> None:
    asyncio.run_coroutine_threadsafe(client.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class TransientError(Exception):
    """A failure that another attempt may not have; `after` is the answer's Retry-After in seconds, 0 if it has none."""

    def __init__(self, problem: str, after: str = "") -> None:
        super().__init__(problem)
        self.after = float(after) if after.isdecimal() else 0.0


def _parsed(url: str, who: str) -> tuple[httpx2.URL, str]:
    """The URL, and its text without the query, which may hold a secret, for error messages.

    Raises:
        ConfigError: the URL holds a user or password, is not http or https, or has no host.
    """
    if "@" in url.partition("?")[0]:  # even in the path, because a password with a slash parses as host, port and path
        fix = "put the token into an environment variable and name it in token_env (write an @ in a path as %40)"
        raise ConfigError([f"{who}: url holds an @, as in user:password@host: {fix}"])
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise ConfigError([f"{who}: url cannot be read, expected http://host:port/path"]) from None
    shown = str(parsed.copy_with(query=None, fragment=None))
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError([f"{who}: url is {shown!r}, expected http://host:port/path"])
    return parsed, shown


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


def png(pixels: "ImageArray") -> bytes:
    """The PNG file of a picture [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def quoted(answer: bytes) -> str:
    """The beginning of an answer for a message."""
    return one_line(answer[: 4 * QUOTED].decode(errors="replace")) or "nothing"


def one_line(text: str) -> str:
    """The text in one line, without control characters and at most QUOTED characters long."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:QUOTED]
