"""The environments of the reward packages, kept between runs: building one takes minutes."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from epd_ray.actors.environments import NAMES, _identity


@pytest.fixture(scope="module")
def real_home() -> Iterator[None]:
    """An $EPD_RAY_HOME in the user's cache, one for each set of pins, Python and Ray; or the one that is set.

    `install` builds there what is missing. A record that it writes last says that an environment is whole, and a lock
    lets one process build.
    """
    pins = hashlib.sha256("".join(f"{name}{_identity(name)}" for name in NAMES).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_RAY_HOME", os.environ.get("EPD_RAY_HOME") or str(cache / "epd-ray-tests" / pins))
        yield
