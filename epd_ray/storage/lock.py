"""One writer a run: on local disks a lock that the kernel gives up with the process, elsewhere a lease.

Its holder renews it. The clocks of two machines are never compared: whoever finds a lease watches, by the clock of its
own machine, whether it changes.
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

from epd_ray.errors import RunDirectoryError, is_own_bug
from epd_ray.storage.run_directory import unwritable

log = logging.getLogger(__name__)

LEASE = "lease.json"
RENEW_SECONDS = 20.0
WATCH_SECONDS = 3.5 * RENEW_SECONDS
"""A lease that does not change while it is watched for so long is of a dead holder; one whose renewal failed once or
twice is alive."""
SETTLE_SECONDS = 1.0  # the later of two who take a lease at the same time is seen by both
POLL_SECONDS = 5.0
OPENINGS = 100  # of a lock file that others remove again and again


@contextmanager
def held(lock: Path, name: str) -> Iterator[TextIO]:
    """Hold a lock file, which is yielded, until the block ends, or the process does, however it ends.

    Args:
        lock: made where it is missing; it stays.
        name: of what is locked, for the message.

    Raises:
        RunDirectoryError: another process holds it, or it cannot be written.
    """
    with _opened(lock, name) as file:
        _sign(lock, file)
        yield file


def _opened(lock: Path, name: str) -> TextIO:
    """The lock file, locked.

    A holder may remove the file when it is done. Who had opened it before then holds a lock on a file that no longer
    has this name, while another process may lock a new one: so the name must still lead to what was locked.
    """
    for _ in range(OPENINGS):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)  # its folder may have gone with it
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
    """Whether a path still leads to an open file, not to nothing or to another of the same name."""
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
    """Who holds a lease.

    Attributes:
        host: its machine, for people.
        machine: what its process id counts in.
        pid: of its process.
        since: when it took the lease, in seconds since 1970 by its own clock: for people alone.
        renewed: when it last renewed the lease, by the same clock: compared with nothing but what it was before.
        token: that no other holder has.
    """

    host: str
    machine: str
    pid: int
    since: float
    renewed: float
    token: str

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
    def held(self) -> Iterator[None]:
        """Take the lease, renew it in the background, and give it up in the end.

        Raises:
            RunDirectoryError: somebody else holds it, or the folder cannot be written.
        """
        try:
            self._take()
        except RunDirectoryError:
            raise
        except Exception as error:  # fsspec's filesystems raise what they like
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
            with suppress(Exception):  # else the next run watches it in vain
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
        """Wait until a lease has not changed for long enough by the clock of this machine.

        Raises:
            RunDirectoryError: it has changed.
        """
        who = _who(first.host, first.pid, first.since)
        log.warning(
            "%s is leased to %s: it is watched for %g s, and taken over if no sign of life comes",
            *(self._name, who, WATCH_SECONDS),
        )
        start = time.monotonic()
        while True:
            asked = time.monotonic()  # before, since an answer that takes long may be as old as the question
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
