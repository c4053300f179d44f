"""Keeps Ray's start silent: where RAY_BACKEND_LOG_LEVEL asks for silence, Ray prints a line to say so."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import ray

NOTICE = b"Set ray log level from environment variable"


@contextmanager
def silent_start() -> Iterator[None]:
    """Drop Ray's NOTICE from the stderr of this process while the block starts or joins a Ray.

    Ray prints it in C++ where it connects, so stderr is held back for that moment, and written without that line.
    """
    connect = ray._raylet.CoreWorker

    @wraps(connect)
    def quietly(*args: Any, **kwargs: Any) -> Any:
        with _without(NOTICE):
            return connect(*args, **kwargs)

    ray._raylet.CoreWorker = quietly
    try:
        yield
    finally:
        ray._raylet.CoreWorker = connect


@contextmanager
def _without(part: bytes) -> Iterator[None]:
    """Leave out the lines of stderr that have this part."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            for line in held:
                if part not in line:
                    os.write(2, line)
