"""A watch over the Ray that this process has started: where it dies, the process ends with one line, and soon.

Without it, Ray ends the process with its own text, some 15 s after its raylet died.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray._private import ray_constants

from epd_ray.errors import ClusterError

POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0  # for the clean-up, which may wait for an answer of the dead; less than Ray's own 15 s
EXIT_CODE = 4  # as the command line has it for a cluster that is lost
VITAL = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)


@contextmanager
def watched() -> Iterator[None]:
    """Raise ClusterError in the block when the raylet or the GCS of the Ray that this process has started dies.

    Where the block has not ended GRACE_SECONDS later, the process ends with the same line. Outside of the main thread,
    which signals need, nothing is watched.
    """
    node, main = ray._private.worker._global_node, threading.main_thread().ident
    if node is None or main is None or threading.get_ident() != main:
        yield
        return
    ended = threading.Event()
    before = signal.signal(signal.SIGUSR1, _raise)
    threading.Thread(target=_watch, args=(node, main, ended), name="watch over Ray", daemon=True).start()
    try:
        yield
    except Exception as error:  # Ray's calls wrap what a signal raises into a SystemError
        if dead := _dead(node):
            raise ClusterError(_line(dead)) from error
        raise
    finally:
        ended.set()
        signal.signal(signal.SIGUSR1, before)


def _watch(node: Any, main: int, ended: threading.Event) -> None:
    while not _dead(node):
        if ended.wait(POLL_SECONDS):
            return
    if ended.is_set():  # it was this process that ended Ray
        return
    signal.pthread_kill(main, signal.SIGUSR1)
    threading.Event().wait(GRACE_SECONDS)
    sys.stderr.write(f"error: {_line(_dead(node))}\n")
    sys.stderr.flush()
    os._exit(EXIT_CODE)


def _dead(node: Any) -> list[str]:
    return [kind for kind, _ in node.dead_processes() if kind in VITAL]


def _line(dead: list[str]) -> str:
    return (
        f"the {' and the '.join(dead)} of this command's own Ray died (killed, or out of memory): start it again; "
        "a run or a sweep goes on with --resume"
    )


def _raise(number: int, frame: FrameType | None) -> None:
    raise ClusterError("Ray died")  # `watched` says more
