"""Virtual environments for published packages that cannot be installed beside this one, and actors that run in them."""

import fcntl
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from epd_ray.errors import EpdRayError, UnknownNameError
from epd_ray.registry import did_you_mean
from epd_ray.storage.documents import read_json

NAMES = ("imagereward", "hpsv2", "fid")
HEADS = {
    "imagereward": ("epd_ray.rewards.package:PackageImageReward", "imagereward"),
    "hpsv2.1": ("epd_ray.rewards.package:PackageHpsv2", "hpsv2"),
}
"""Reward head -> the class that runs its published package, and the environment that the class needs."""

EXTRACTORS = {"inception": "fid"}
"""Feature extractor -> the environment in which it runs."""

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PACKAGE = Path(__file__).parents[1]
REQUIREMENTS = Path(__file__).parent / "requirements"

log = logging.getLogger(__name__)


class EnvironmentFailure(EpdRayError):
    """An environment that is not built, is out of date, or cannot be built."""


def home() -> Path:
    """The folder of the environments: $EPD_RAY_HOME, by default ~/.cache/epd_ray."""
    return Path(os.environ.get("EPD_RAY_HOME") or Path.home() / ".cache" / "epd_ray").expanduser().absolute()


def requirements(name: str) -> list[str]:
    """The lines of an environment's requirement file, without comments.

    Raises:
        UnknownNameError: there is no environment of this name.
    """
    if name not in NAMES:
        raise UnknownNameError(f"unknown environment {name!r}{did_you_mean(name, NAMES)}")
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def interpreter(name: str) -> Path:
    """The Python interpreter of an environment.

    Raises:
        UnknownNameError: there is no environment of this name.
        EnvironmentFailure: it is not built, or was built for another Ray, Python or requirement file.
    """
    problem = _problem(name)
    if problem:
        raise EnvironmentFailure(f"environment {name!r} {problem}: run `epd-ray rewards install {name}`")
    _link(_folder(name))
    return _python(name)


def package_spec(head: str) -> tuple[str, Path]:
    """How a head runs through its published package.

    Returns:
        The "module:Class" of the head, and the interpreter of its environment.

    Raises:
        UnknownNameError: no published package has this head.
        EnvironmentFailure: see `interpreter`.
    """
    if head not in HEADS:
        raise UnknownNameError(f"reward head {head!r} has no package backend{did_you_mean(head, HEADS)}")
    target, environment = HEADS[head]
    return target, interpreter(environment)


def runtime_env(python: str) -> dict[str, object]:
    """The runtime environment of Ray for an actor that runs on the interpreter `python`.

    Where a node has no such interpreter, the actor runs on that of the driver, and the head says which package is
    missing; Ray itself would try to start the missing interpreter for ever. PYTHONPATH is emptied, because the packages
    of the driver would hide those of the environment.
    """
    own, other = shlex.quote(python), shlex.quote(sys.executable)
    return {"py_executable": f'"$(test -x {own} && echo {own} || echo {other})"', "env_vars": {"PYTHONPATH": ""}}


def install(name: str, *, force: bool = False, say: Callable[[str], None] = log.info) -> Path:
    """Build an environment on this machine, unless it is built and up to date.

    Args:
        name: one of NAMES.
        force: whether to build it again in any case.
        say: receives each line of progress.

    Returns:
        The interpreter of the environment.

    Raises:
        UnknownNameError: there is no environment of this name.
        EnvironmentFailure: a step of the build failed.
    """
    wanted = _identity(name)
    folder = _folder(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(
        folder.with_suffix(".lock"), lambda: say(f"{name}: waiting for another process that builds the environment")
    ):
        if force or _problem(name):
            _build(name, folder, say)
            record = folder / "environment.json.new"
            record.write_text(json.dumps(wanted))
            record.replace(_record(name))  # the environment counts as built when this file is there
    return interpreter(name)


def _build(name: str, folder: Path, say: Callable[[str], None]) -> None:
    _record(name).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    python = str(_python(name))
    say(f"{name}: making a virtual environment in {folder}")
    _run(name, [sys.executable, "-m", "virtualenv", "--quiet", str(folder)], say)
    say(f"{name}: installing {', '.join(requirements(name))}, which takes minutes and gigabytes of disk")
    wheels = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    _run(name, [*wheels, *requirements(name), f"ray=={metadata.version('ray')}"], say)
    if name == "hpsv2":
        source, target = _packages(folder) / "open_clip", _packages(folder) / "hpsv2" / "src" / "open_clip"
        shutil.copyfile(source / VOCABULARY, target / VOCABULARY)
    _link(folder)
    say(f"{name}: trying the environment")
    # This imports what an actor imports, and so also compiles the modules, which makes the actor start faster.
    needed = "import epd_ray.evaluation.suites.feature_pool; from epd_ray.rewards import package"
    _run(name, [python, "-W", "ignore", "-c", f"{needed}; package.PACKAGES[{name!r}]()"], say)
    say(f"{name}: the environment is built")


def _run(name: str, command: Sequence[str], say: Callable[[str], None]) -> None:
    """Run a step of the build, and pass its lines of progress on.

    Raises:
        EnvironmentFailure: the step failed; the message has its error.
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    last: deque[str] = deque(maxlen=40)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=clean
    ) as process:
        for line in process.stdout or ():
            last.append(line.strip())
            if line.startswith(("Collecting", "Processing", "Building wheel", "Installing collected")):
                say(f"{name}: {line.strip()[:100]}")
    if process.returncode:
        said = [line for line in last if line]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no output")
        step = " ".join(command[1:4])
        raise EnvironmentFailure(f"environment {name!r} cannot be built: `{step}` failed ({reason[:300]})")


def _problem(name: str) -> str | None:
    """Why an environment cannot be used; None where it can."""
    wanted = _identity(name)
    record = _record(name)
    if not record.is_file():
        return "is not built"
    try:
        built = read_json(record, EnvironmentFailure, "build it again")
    except EnvironmentFailure:
        built = None
    if not isinstance(built, dict):
        return f"has a damaged {record.name}"
    other = [key for key, value in wanted.items() if built.get(key) != value]
    if other:
        return f"was built for {other[0]} {built.get(other[0])}, now it is {wanted[other[0]]}"
    return None if _python(name).is_file() else f"has lost its interpreter {_python(name)}"


def _identity(name: str) -> dict[str, str]:
    """The versions of Ray, Python and the requirements for which an environment is built."""
    content = hashlib.sha256("\n".join(requirements(name)).encode()).hexdigest()[:12]
    minor = ".".join(platform.python_version_tuple()[:2])
    return {"ray": metadata.version("ray"), "python": minor, "requirements": content}


def _link(folder: Path) -> None:
    """Link this package into the environment, without the other packages beside it."""
    link = _packages(folder) / PACKAGE.name
    if link.is_symlink() and link.readlink() == PACKAGE:
        return
    fresh = link.with_name(f"{link.name}.{os.getpid()}")
    fresh.symlink_to(PACKAGE)
    fresh.replace(link)


def _folder(name: str) -> Path:
    return home() / "environments" / name


def _record(name: str) -> Path:
    return _folder(name) / "environment.json"


def _python(name: str) -> Path:
    return _folder(name) / "bin" / "python"


def _packages(folder: Path) -> Path:
    minor = ".".join(platform.python_version_tuple()[:2])
    return folder / "lib" / f"python{minor}" / "site-packages"


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
