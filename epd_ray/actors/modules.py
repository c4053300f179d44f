"""The user's own modules, which hold heads or backbones named module:Class: found here, and sent to every node."""

import sys
from collections.abc import Sequence
from pathlib import Path

from epd_ray.errors import ConfigError, shown


def importable(paths: Sequence[str]) -> tuple[str, ...]:
    """Make modules importable in this process, behind everything that is importable already.

    Args:
        paths: files with the suffix .py, and folders of packages; relative ones count from the working directory.

    Returns:
        The absolute paths, in the form that Ray's runtime environment takes as `py_modules`.

    Raises:
        ConfigError: a path is neither a .py file nor a folder; all such paths are named.
    """
    found = [Path(path).expanduser().absolute() for path in paths]
    wrong = [p for p, place in zip(paths, found, strict=True) if not _is_module(place)]
    if wrong:
        raise ConfigError(
            [
                f"cluster.py_modules: {shown(p)} is not there as a .py file or the folder of a package: "
                "name the file or folder itself, from the working directory on"
                for p in wrong
            ]
        )
    for place in found:
        if str(place.parent) not in sys.path:
            sys.path.append(str(place.parent))
    return tuple(map(str, found))


def _is_module(place: Path) -> bool:
    return place.is_dir() or (place.is_file() and place.suffix == ".py")
