"""The environments of the reward packages, built once for all slow tests of a session."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def real_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An $EPD_RAY_HOME for the session, unless one is set; `install` builds there what is not built yet."""
    home = os.environ.get("EPD_RAY_HOME") or str(tmp_path_factory.getbasetemp() / "epd_ray_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_RAY_HOME", home)
        yield
