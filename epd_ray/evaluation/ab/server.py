"""A local web server for a side-by-side page, which saves the votes beside the page as they are given."""

import errno
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from epd_ray.errors import ConfigError, RunDirectoryError, SideBySideError
from epd_ray.evaluation.ab.records import PAGE, RESULTS, Votes, check_votes, read_key
from epd_ray.storage.run_directory import write_text

HOST = "127.0.0.1"
LARGEST = 16 << 20  # the largest size of results, in bytes


class PageServer(ThreadingHTTPServer):
    """Serves one page's folder: GET / returns the page, GET and PUT /results read and save its votes.

    Args:
        folder: the folder of the page.
        port: the port to listen on; 0 takes any free one.

    Raises:
        SideBySideError: the folder has no page.
        ConfigError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.key = folder, read_key(folder)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise ConfigError([f"port {port} of {HOST}: {error.strerror} (give another --port)"]) from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        if not self._own():
            return
        saved = self.server.folder / RESULTS
        if self.path == "/":
            self._answer(HTTPStatus.OK, (self.server.folder / PAGE).read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/results":
            self._answer(HTTPStatus.OK, saved.read_bytes() if saved.is_file() else b"null", "application/json")
        else:
            self._answer(HTTPStatus.NOT_FOUND)

    def do_PUT(self) -> None:
        size = self.headers.get("Content-Length", "")
        if not self._own():
            return
        if self.path != "/results" or not size.isdigit() or int(size) > LARGEST:
            self._answer(HTTPStatus.BAD_REQUEST)
            return
        text = self.rfile.read(int(size))
        try:
            check_votes(Votes.model_validate_json(text), self.server.key, "what the page sent")
            write_text(self.server.folder / RESULTS, text.decode())
        except (ValidationError, SideBySideError) as error:
            self._answer(HTTPStatus.CONFLICT, str(error).splitlines()[0].encode())
        except RunDirectoryError as error:
            self._answer(HTTPStatus.INSUFFICIENT_STORAGE, str(error).encode())
        else:
            self._answer(HTTPStatus.NO_CONTENT)

    def _own(self) -> bool:
        """Refuse requests that a page of another site makes the browser send."""
        port = self.server.server_address[1]
        hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        own = self.headers.get("Host") in hosts and (origin is None or origin.removeprefix("http://") in hosts)
        if not own:
            self._answer(HTTPStatus.FORBIDDEN)
        return own

    def _answer(self, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing, because the page itself says whether its votes are saved."""


def serve_page(folder: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve a page until Ctrl-C.

    Args:
        folder: the folder of the page.
        port: the port to listen on; 0 takes any free one.
        say: prints a line for the user.

    Raises:
        SideBySideError: the folder has no page.
        ConfigError: the port is taken.
    """
    with PageServer(folder, port) as server:
        say(f"open {server.url} (votes are saved in {folder / RESULTS}; Ctrl-C ends the server)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"then: epd-ray ab results {folder}")
