"""Ensures one writer per run: by a file lock on local disks, which ends with its process, and elsewhere by a lease.

The holder of a lease renews it regularly. The clocks of two machines are never compared: another process that finds a
lease watches, by its own clock, whether the lease changes.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from pyarrow import fs
from pydantic import TypeAdapter

from epd_ray.errors import RunDirectoryError, is_own_bug
from epd_ray.storage.run_directory import unwritable

log = logging.getLogger(__name__)

LEASE = "lease.json"
RENEW_SECONDS = 20.0
WATCH_SECONDS = 3.5 * RENEW_SECONDS
"""The holder of a lease counts as dead if the lease does not change for so long; two failed renewals are tolerated."""
SETTLE_SECONDS = 1.0  # if two processes take a lease at the same time, both see the later one after this time
POLL_SECONDS = 5.0
OPENINGS = 100  # attempts to open a lock file that other processes keep removing


@contextmanager
def held(lock: Path, name: str) -> Iterator[TextIO]:
    """Hold a lock file until the block ends, or the process dies. Yields the open file.

    Args:
        lock: path of the lock file, which is created if it is missing and is not removed.
        name: name of the run, for error messages.

    Raises:
        RunDirectoryError: another process holds the lock, or the file cannot be written.
    """
    with _opened(lock, name) as file:
        _sign(lock, file)
        yield file


def _opened(lock: Path, name: str) -> TextIO:
    """Open the lock file and lock it.

    A holder may remove the file when it ends. A process that opened the file before would then lock a file without a
    name, while another process locks a new file. Therefore the path must still lead to the locked file.
    """
    for _ in range(OPENINGS):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)  # the folder may have been removed with the file
            file = lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise unwritable(lock, error) from error
        if not _locked(file.fileno(), name):
            with file:
                file.seek(0)
                who = file.read().strip() or "another process"
            raise _in_use(name, who)
        if is_at(file, lock):
            return file
        file.close()
    raise _in_use(name, "other processes")


def _in_use(name: str, who: str) -> RunDirectoryError:
    return RunDirectoryError(f"{name} is in use by {who}: wait for it, stop it, or name another directory")


def is_at(file: TextIO, path: Path) -> bool:
    """Whether a path still leads to an open file; False if the file was removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sign(lock: Path, file: TextIO) -> None:
    try:
        file.truncate(0)
        file.write(_who(socket.gethostname(), os.getpid(), time.time()))
        file.flush()
    except OSError as error:
        with suppress(OSError):
            file.truncate(0)
        raise unwritable(lock, error) from error


def _locked(descriptor: int, name: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network disks do not support locks
        log.warning("%s cannot be locked (%s): see to it that no second run uses it", name, error.strerror)
    return True


def _machine() -> str:
    """An id of this boot and process namespace, in which process ids are unique; empty if the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    return ""


def _who(host: str, pid: int, since: float) -> str:
    return f"process {pid} on {host} since {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(since))}"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease.

    Attributes:
        host: name of its machine, for messages.
        machine: id of the boot and process namespace to which `pid` belongs; empty if unknown.
        pid: its process id.
        since: when it took the lease, in seconds since 1970 by its own clock; only for messages.
        renewed: when it last renewed the lease, by the same clock; only changes of this value matter.
        token: random id that no other holder has.
    """

    host: str
    machine: str
    pid: int
    since: float
    renewed: float
    token: str

    def gone(self) -> bool:
        """Whether the holder was a process of this machine that no longer exists."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


_HOLDER = TypeAdapter(Holder)


class Lease:
    """The exclusive right to write to a remote run, kept as a file in the run that its holder renews.

    Args:
        root: filesystem whose root is the run's folder.
        name: URI of the run, for messages.
    """

    def __init__(self, root: fs.FileSystem, name: str) -> None:
        self._root, self._name = root, name
        now = time.time()
        self._mine = Holder(socket.gethostname(), _machine(), os.getpid(), now, now, uuid.uuid4().hex)
        self._ended, self._renewing = threading.Event(), threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Take the lease, renew it in a thread, and delete it when the block ends.

        Raises:
            RunDirectoryError: another process holds the lease, or the folder cannot be written.
        """
        try:
            self._take()
        except RunDirectoryError:
            raise
        except Exception as error:  # fsspec's filesystems raise any kind of exception
            if is_own_bug(error):
                raise
            raise RunDirectoryError(f"cannot write to {self._name}: {' '.join(str(error).split())}") from error
        renewal = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            self._ended.set()
            renewal.join()
            with suppress(Exception):  # if the lease stays, the next run only has to watch it
                if self._is_mine(self._read()):
                    self._root.delete_file(LEASE)

    def require(self) -> None:
        """Check that no other run has taken the lease because this one seemed dead.

        Raises:
            RunDirectoryError: another run took the lease, and may have deleted it since.
            Exception: the folder cannot be read.
        """
        with self._renewing:
            holder = self._read()
        if not self._is_mine(holder):
            by = f"by {_who(holder.host, holder.pid, holder.since)}" if holder else f"(its {LEASE} is gone)"
            raise RunDirectoryError(f"{self._name} was taken over {by}: this run ends")

    def _take(self) -> None:
        holder = self._read()
        if holder is not None and not holder.gone():
            self._watch(holder)
        self._write(self._mine)
        time.sleep(SETTLE_SECONDS)
        self.require()

    def _watch(self, first: Holder) -> None:
        """Return when the lease of `first` has not changed for WATCH_SECONDS by this machine's clock, or is gone.

        Raises:
            RunDirectoryError: the lease has changed, so its holder is alive.
        """
        who = _who(first.host, first.pid, first.since)
        log.warning(
            "%s is leased to %s: it is watched for %g s, and taken over if no sign of life comes",
            *(self._name, who, WATCH_SECONDS),
        )
        start = time.monotonic()
        while True:
            asked = time.monotonic()  # before the read, because a slow answer may be as old as its request
            holder = self._read()
            if holder is None or holder.gone():
                return
            if holder != first:
                raise _in_use(self._name, _who(holder.host, holder.pid, holder.since))
            if asked - start >= WATCH_SECONDS:
                return
            time.sleep(POLL_SECONDS)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                with self._renewing:
                    if self._is_mine(self._read()):
                        self._write(replace(self._mine, renewed=time.time()))
            except Exception as error:
                log.warning("the lease of %s could not be renewed: %s", self._name, error)

    def _is_mine(self, holder: Holder | None) -> bool:
        return holder is not None and holder.token == self._mine.token

    def _read(self) -> Holder | None:
        for pause in (POLL_SECONDS, 0.0):  # a lease that cannot be parsed may be half written: read it twice
            if self._root.get_file_info(LEASE).type != fs.FileType.File:
                return None
            try:
                with self._root.open_input_stream(LEASE) as stream:
                    return _HOLDER.validate_json(stream.read(), strict=True)
            except FileNotFoundError:  # deleted since get_file_info
                return None
            except ValueError:
                time.sleep(pause)
        return None

    def _write(self, holder: Holder) -> None:
        partial = f".{holder.token}.tmp"
        with self._root.open_output_stream(partial) as stream:
            stream.write(json.dumps(asdict(holder)).encode())
        self._root.move(partial, LEASE)
