"""A small HTTP server, and what it refuses: strangers' names and sites, other tokens, large requests and slow ones."""

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from epd_ray.errors import ConfigError

LOOPBACK_NAMES = frozenset({"127.0.0.1", "::1", "localhost"})
WAITING_BODIES = 16  # largest requests whose bytes the server holds at a time; above, it answers 503
END_SECONDS = 2  # for requests that are being answered when the server ends
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """What the server accepts.

    Attributes:
        body_bytes: the largest body of a request, in bytes.
        token: the bearer token that every request must have; "" asks for none.
        seconds: the time for a request to arrive, from the connection or from the last answer on it.
    """

    body_bytes: int
    token: str = field(default="", repr=False)
    seconds: float = 30.0


@dataclass(frozen=True)
class Asked:
    """A request that the rules allow."""

    method: str
    path: str
    body: bytes


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    status: int
    body: bytes = b""
    kind: str = "text/plain; charset=utf-8"


def answer_json(content: object, status: int = HTTPStatus.OK) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(content).encode(), "application/json")


def problem(status: int, text: str) -> Answer:
    """The answer {"error": text}, in one line of at most 500 characters."""
    return answer_json({"error": " ".join(text.split())[:500]}, status)


Handle = Callable[[Asked], Awaitable[Answer]]
"""Answers a request; an exception becomes status 500."""


def bound(host: str, port: int, token: str = "", token_fix: str = "") -> socket.socket:
    """A socket on an address, which does not listen yet.

    Args:
        host: a name or an IP address.
        port: the port; 0 takes any free one.
        token: the token that requests need, without which only loopback addresses are allowed.
        token_fix: says how to set a token, for the message.

    Raises:
        ConfigError: the address cannot be used, or others could reach it and there is no token.
    """
    where = f"{host}:{port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        if not token and not _is_loopback(str(address[0])):
            raise ConfigError([f"{where} can be reached from other machines, but requests need no token: {token_fix}"])
        found = socket.socket(family, kind)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((address[0], port, *address[2:]))  # which, unlike getaddrinfo, refuses a port above 65535
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError([f"cannot listen on {where} ({error}): choose another --host or --port"]) from None
    return found


@contextmanager
def answering(listener: socket.socket, host: str, handle: Handle, rules: Rules) -> Iterator[str]:
    """Answer requests in a thread until the end of the block, which closes the socket; yields the URL of the root.

    Args:
        listener: the socket, from `bound`.
        host: the name or address that it was bound by.
        handle: answers the requests; it runs in the event loop of the thread.
        rules: what is refused.
    """
    config = uvicorn.Config(
        _App(handle, _Names(host), rules),
        loop="asyncio",
        http=_with_deadline(rules.seconds),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level=logging.CRITICAL,  # what strangers send is no news
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=END_SECONDS,
    )
    server = uvicorn.Server(config)
    listener.listen(config.backlog)  # from here on connections succeed, before the thread has begun
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="web server", daemon=True)
    thread.start()
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


class _Names:
    """The names by which the server may be asked.

    A page of another site can make a browser ask this machine under the site's own name, by changing what the name
    stands for. Such a request has the site's name as its Host.
    """

    def __init__(self, host: str) -> None:
        self._names = LOOPBACK_NAMES | {host.lower()}
        self._any_address = host in ("0.0.0.0", "::")
        if self._any_address:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def __contains__(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._names or (self._any_address and bool(ipaddress.ip_address(name)))
        except ValueError:
            return False


class _GoneError(Exception):
    """The sender has closed the connection."""


class _App:
    """The ASGI application: checks a request, reads its body, and has it answered."""

    def __init__(self, handle: Handle, names: _Names, rules: Rules) -> None:
        self._handle, self._names, self._rules = handle, names, rules
        self._held = 0  # bytes of all bodies that are being read or answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            answer = self._refusal(headers) or await self._read(receive, body)
            answer = answer or await self._handle(Asked(scope["method"], scope["path"], bytes(body)))
        except _GoneError:
            return
        except Exception:  # the server answers whatever happens, and goes on
            log.exception("a request failed")
            answer = problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the server made a mistake, which its log has")
        finally:
            self._held -= len(body)
        sent = {
            "content-type": answer.kind,
            "content-length": str(len(answer.body)),
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
        }
        raw = [(name.encode(), value.encode()) for name, value in sent.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        await send({"type": "http.response.body", "body": answer.body})

    def _refusal(self, headers: Mapping[str, str]) -> Answer | None:
        """The answer to a request that is refused before its body is read."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if host not in self._names:
            return problem(HTTPStatus.FORBIDDEN, "the Host of the request is none of this server's names")
        if origin is not None and origin != f"http://{host}":
            return problem(HTTPStatus.FORBIDDEN, "the Origin of the request is another site")
        sent, wanted = headers.get("authorization", ""), f"Bearer {self._rules.token}"
        if self._rules.token and not hmac.compare_digest(sent.encode(), wanted.encode()):
            return problem(HTTPStatus.UNAUTHORIZED, "the request lacks the bearer token of this server")
        size = headers.get("content-length", "0")
        return self._too_large() if len(size) > 18 or int(size) > self._rules.body_bytes else None

    async def _read(self, receive: Any, body: bytearray) -> Answer | None:
        """Read the body of a request into `body`; an answer where it is too large or comes too slowly."""
        try:
            async with asyncio.timeout(self._rules.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    body += piece
                    self._held += len(piece)
                    if len(body) > self._rules.body_bytes:
                        return self._too_large()
                    if self._held > WAITING_BODIES * self._rules.body_bytes:
                        return problem(HTTPStatus.SERVICE_UNAVAILABLE, "too many large requests at once: try again")
        except TimeoutError:
            return problem(HTTPStatus.REQUEST_TIMEOUT, f"the request took longer than {self._rules.seconds:g} s")
        return None

    def _too_large(self) -> Answer:
        text = f"the body has more than {self._rules.body_bytes} bytes"
        return problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)


def _with_deadline(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which by itself waits without end for the rest of a request's first lines."""

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_request(math.inf)

        def on_response_complete(self) -> None:
            self._expect_request(math.inf)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _expect_request(self, unsent: float) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, self._give_up, self.cycle, unsent)

        def _give_up(self, last: object, unsent: float) -> None:
            """Drop a connection without a new request, unless it has taken more of the last answer meanwhile."""
            left = self.transport.get_write_buffer_size()
            if self.cycle is not last:
                return
            if 0 < left < unsent:
                self._expect_request(left)
            else:
                self.transport.abort()

    return Protocol
