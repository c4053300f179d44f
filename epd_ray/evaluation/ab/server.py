"""A local web server for a side-by-side page, which saves the votes beside the page as they are given."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from epd_ray.errors import RunDirectoryError, SideBySideError
from epd_ray.evaluation.ab.records import PAGE, RESULTS, largest_votes, parse_votes, read_key
from epd_ray.report.web import Answer, Asked, Rules, answering, bound
from epd_ray.storage.run_directory import write_text

HOST = "127.0.0.1"


class PageApp:
    """Answers for a page's folder: GET / returns the page, GET and PUT /results read and save its votes.

    Args:
        folder: the folder of the page.

    Raises:
        SideBySideError: the folder has no page.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, read_key(folder)

    async def __call__(self, asked: Asked) -> Answer:
        saved = self.folder / RESULTS
        match asked.method, asked.path:
            case "GET", "/":
                return Answer(HTTPStatus.OK, (self.folder / PAGE).read_bytes(), "text/html; charset=utf-8")
            case "GET", "/results":
                return Answer(HTTPStatus.OK, saved.read_bytes() if saved.is_file() else b"null", "application/json")
            case "PUT", "/results":
                return self._save(asked.body)
        return Answer(HTTPStatus.NOT_FOUND)

    def _save(self, text: bytes) -> Answer:
        try:
            votes = parse_votes(text, self.key, "what the page sent")
            write_text(self.folder / RESULTS, votes.model_dump_json())
        except SideBySideError as error:
            return Answer(HTTPStatus.CONFLICT, str(error).encode())
        except RunDirectoryError as error:
            return Answer(HTTPStatus.INSUFFICIENT_STORAGE, str(error).encode())
        return Answer(HTTPStatus.NO_CONTENT)


@contextmanager
def served_page(folder: Path, port: int) -> Iterator[str]:
    """Serve a page to this machine until the end of the block; yields its URL.

    Args:
        folder: the folder of the page.
        port: the port to listen on; 0 takes any free one.

    Raises:
        SideBySideError: the folder has no page.
        ConfigError: the port is taken.
    """
    app = PageApp(folder)
    rules = Rules(largest_votes(app.key))
    with bound(HOST, port) as listener, answering(listener, HOST, app, rules) as root:
        yield f"{root}/"


def serve_page(folder: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve a page until Ctrl-C; the arguments and errors are those of `served_page`, and `say` prints a line."""
    with served_page(folder, port) as url:
        say(f"open {url} (votes are saved in {folder / RESULTS}; Ctrl-C ends the server)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say(f"then: epd-ray ab results {folder}")
