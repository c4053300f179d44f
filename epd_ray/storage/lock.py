"""One writer a run: on local disks a lock that the kernel gives up with the process, elsewhere a lease that expires."""

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

from epd_ray.errors import RunDirectoryError
from epd_ray.storage.run_directory import unwritable

log = logging.getLogger(__name__)

LEASE = "lease.json"
LEASE_SECONDS = 180.0
"""Without a renewal for so long a lease's holder counts as dead."""
RENEW_SECONDS = 30.0
SETTLE_SECONDS = 1.0  # the later of two who take a lease at the same time is seen by both
POLL_SECONDS = 5.0


@contextmanager
def held(lock: Path, name: str) -> Iterator[None]:
    """Hold a lock file until the block ends, or the process does, however it ends.

    Args:
        lock: made where it is missing; it stays.
        name: of what is locked, for the message.

    Raises:
        RunDirectoryError: another process holds it, or it cannot be written.
    """
    try:
        file = lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(lock, error) from error
    with file:
        if not _locked(file.fileno(), name):
            file.seek(0)
            raise RunDirectoryError(
                f"{name} is in use by {file.read().strip() or 'another process'}: wait for it, stop it, or name "
                "another directory"
            )
        _sign(lock, file)
        yield


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
    except OSError as error:  # some network disks cannot
        log.warning("%s cannot be locked (%s): see to it that no second run uses it", name, error.strerror)
    return True


def _machine() -> str:
    """What process ids count in, this boot of this machine or container; empty where the system does not say."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    return ""


def _who(host: str, pid: int, since: float) -> str:
    return f"process {pid} on {host} since {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(since))}"


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; times are in seconds since 1970."""

    host: str
    machine: str
    pid: int
    since: float
    renewed: float
    token: str

    def age(self) -> float:
        """Seconds since the last sign of life."""
        return time.time() - self.renewed

    def gone(self) -> bool:
        """Whether it was a process of this machine that is no more."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


class Lease:
    """The right to write to a remote run: an object in it that its holder renews.

    Args:
        root: the run's folder.
        name: its URI, for messages.
    """

    def __init__(self, root: fs.FileSystem, name: str) -> None:
        self._root, self._name = root, name
        now = time.time()
        self._mine = Holder(socket.gethostname(), _machine(), os.getpid(), now, now, uuid.uuid4().hex)
        self._ended, self._renewing = threading.Event(), threading.Lock()

    @contextmanager
    def held(self, wait: bool) -> Iterator[None]:
        """Take the lease, renew it in the background, and give it up in the end.

        Args:
            wait: for a holder that shows no sign of life to count as dead.

        Raises:
            RunDirectoryError: somebody else holds it, or the folder cannot be written.
        """
        try:
            self._take(wait)
        except RunDirectoryError:
            raise
        except Exception as error:  # fsspec's filesystems raise what they like
            raise RunDirectoryError(f"cannot write to {self._name}: {' '.join(str(error).split())}") from error
        renewal = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            self._ended.set()
            renewal.join()
            with suppress(Exception):  # else it expires
                if self._is_mine(self._read()):
                    self._root.delete_file(LEASE)

    def require(self) -> None:
        """See that no other run has taken over, since this one seemed dead; it may be done by now.

        Raises:
            RunDirectoryError: one has.
            Exception: the folder cannot be read.
        """
        with self._renewing:
            holder = self._read()
        if not self._is_mine(holder):
            by = f"by {self._describe(holder)}" if holder else f"(its {LEASE} is gone)"
            raise RunDirectoryError(f"{self._name} was taken over {by}: this run ends")

    def _take(self, wait: bool) -> None:
        holder = self._read()
        if holder is not None and not holder.gone():
            if wait:
                self._watch(holder)
            elif holder.age() <= LEASE_SECONDS:
                raise self._in_use(holder)
        self._write(replace(self._mine, renewed=time.time()))
        time.sleep(SETTLE_SECONDS)
        self.require()

    def _watch(self, first: Holder) -> None:
        """Wait until a holder was silent for long enough by the clock of this machine; the holder's may be wrong."""
        log.warning("%s was in use by %s: waiting for a sign of life", self._name, self._describe(first))
        end = time.monotonic() + LEASE_SECONDS
        while (holder := self._read()) is not None and not holder.gone():
            if holder != first:
                raise self._in_use(holder)
            if time.monotonic() > end:
                return
            time.sleep(POLL_SECONDS)

    def _in_use(self, holder: Holder) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self._name} is in use by {self._describe(holder)}: if it is dead, wait "
            f"{max(1, LEASE_SECONDS - holder.age()):.0f} s, or delete {LEASE} there"
        )

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

    def _describe(self, holder: Holder) -> str:
        who = _who(holder.host, holder.pid, holder.since)
        return f"{who} (last sign of life {max(0, holder.age()):.0f} s ago)"

    def _read(self) -> Holder | None:
        for pause in (POLL_SECONDS, 0.0):  # what makes no sense may be half written
            if self._root.get_file_info(LEASE).type != fs.FileType.File:
                return None
            try:
                with self._root.open_input_stream(LEASE) as stream:
                    return Holder(**json.loads(stream.read()))
            except FileNotFoundError:  # given up just now
                return None
            except (ValueError, TypeError):
                time.sleep(pause)
        return None

    def _write(self, holder: Holder) -> None:
        partial = f".{holder.token}.tmp"
        with self._root.open_output_stream(partial) as stream:
            stream.write(json.dumps(asdict(holder)).encode())
        self._root.move(partial, LEASE)
