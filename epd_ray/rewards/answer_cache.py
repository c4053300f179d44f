"""Answers of a judge that were paid for, in a file that several processes share."""

import hashlib
import sqlite3
import threading
from pathlib import Path
from types import TracebackType

from epd_ray.errors import ConfigError, RewardError

WAIT_SECONDS = 60.0  # for another process that writes
TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"


class AnswerCache:
    """Question -> answer, in an SQLite file on a local disk.

    Args:
        path: the file; it is made if it is missing, its folder is not.

    Raises:
        ConfigError: the folder is missing, or the file cannot be opened, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._turn = path, threading.Lock()
        if not path.parent.is_dir():
            raise ConfigError([f"judge reward head: cache {path}: its folder is missing: make it, or change the path"])
        try:
            self._file = sqlite3.connect(path, timeout=WAIT_SECONDS, check_same_thread=False, isolation_level=None)
            self._file.execute(TABLE)
            self._file.execute("SELECT key, answer FROM answers LIMIT 1")
        except sqlite3.Error as error:
            raise ConfigError(
                [f"judge reward head: cache {path} cannot be used ({error}): name another file"]
            ) from error

    def close(self) -> None:
        """Close the file."""
        with self._turn:
            self._file.close()

    def get(self, key: str) -> str | None:
        """The answer to a question; None if there is none yet."""
        with self._turn, _Reported(self._path):
            found = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def put(self, key: str, answer: str) -> None:
        """Keep an answer; each is written at once, so that none is lost with the process."""
        with self._turn, _Reported(self._path):
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))


class _Reported:
    """Turns errors of SQLite into RewardError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, sqlite3.Error):
            raise RewardError("judge", f"the cache {self._path} failed ({error}): name another file") from error


def key_of(*parts: str | bytes) -> str:
    """A hash of a question's parts, which tells apart where one ends and the next begins."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()
