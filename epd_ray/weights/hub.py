"""Turns every failure to open a model from a directory or the hub into one line that says what to do, and soon."""

import functools
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the HTTP client that the hub's library uses
from safetensors import SafetensorError

from epd_ray.embedded.models import EMBEDDED
from epd_ray.errors import HubError, ModelError, is_own_bug, shown

UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, EOFError, httpx.HTTPError,
)  # fmt: skip
"""What the loaders of diffusers, transformers and torch raise for missing or damaged files and failed downloads."""

TOKEN = "set HF_TOKEN to a read token of that account (named in cluster.env for actors on other machines)"

HUB_FAILURES = (OSError, HFValidationError, httpx.HTTPError)
"""Exceptions that the hub's client raises for invalid names, missing access rights, lost connections and files."""

UNREACHED = (LocalEntryNotFoundError, OfflineModeIsEnabled)
"""Those of a file that is not in the local cache while the hub cannot be reached."""

PROBES, PROBE_SECONDS, PAUSE_SECONDS = 2, 4.0, 1.0  # how often, and how long each time, the hub is asked for a sign

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_STATUS = re.compile(r"\d{3} Client Error|\(Request ID")


def of_hub(model: str) -> bool:
    """Whether a model is neither embedded nor on this machine, and could be a hub id."""
    return model not in EMBEDDED and _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def lacking(models: Iterable[str]) -> list[str]:
    """The hub ids of which nothing is in the local cache although the hub does not answer; it is asked only for these.

    Args:
        models: directories and hub ids "owner/name".
    """
    absent = [model for model in models if "/" in model and of_hub(model) and not _cached(model)]
    if absent:
        seek_hub()
    return absent if constants.HF_HUB_OFFLINE else []


def _cached(repo_id: str) -> bool:
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"), "snapshots")
    return folder.is_dir() and any(folder.iterdir())


def seek_hub() -> None:
    """Ask once per process whether the hub answers; where it does not, its client goes on with the local cache alone.

    Otherwise the client would ask for each file six times, which takes 23 s where connections are refused, and minutes
    where nothing answers. The processes that this one starts inherit the finding.
    """
    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


@functools.cache
def _answers(endpoint: str) -> bool:
    """Whether a server answers a request, whatever it says."""
    for attempt in range(PROBES):
        time.sleep(PAUSE_SECONDS if attempt else 0)
        try:
            get_session().head(endpoint, timeout=PROBE_SECONDS)
            return True
        except (httpx.HTTPError, OSError):
            continue
    return False


@contextmanager
def opening(model: str, kind: str = "model") -> Iterator[None]:
    """Turn any exception of a loader into a ModelError; programming mistakes in this package are raised unchanged.

    Args:
        model: directory or hub id, as the user gave it.
        kind: what it is called in the message, such as "CLIP model".

    Raises:
        ModelError: the message names the model, what is wrong, and the fix for a gated or private model.
        HubError: the model is not in the local cache, and the hub cannot be reached.
    """
    if of_hub(model):
        seek_hub()
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        chain = list(_causes(error))
        if is_own_bug(error) or (not _is_pickle(chain) and not any(isinstance(e, UNREADABLE) for e in chain)):
            raise
        failure = HubError if any(isinstance(e, UNREACHED) for e in chain) else ModelError
        raise failure(f"{kind} {shown(model)} cannot be opened: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """One line that says what went wrong and what to do.

    Args:
        error: exception of a loader or of the hub's client; its causes are searched, too.
    """
    chain = list(_causes(error))
    first = first_line(error)
    if _is_pickle(chain):
        return f"its checkpoint is a plain pickle, which could run code (convert it to safetensors): {first}"
    for cause in chain:
        problem = first_line(cause)
        if isinstance(cause, GatedRepoError):
            return f"{problem} (accept its licence on the model's page while logged in, then {TOKEN})"
        if isinstance(cause, RevisionNotFoundError):
            return f"{problem} (check the revision: give a branch, a tag or a commit)"
        if isinstance(cause, RepositoryNotFoundError):
            return f"{problem} (check the name; for a private model, {TOKEN})"
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            return f"{problem} ({TOKEN})"
        if isinstance(cause, RemoteEntryNotFoundError):
            return f"{problem} (the repository has no such file: give one in its library's own layout)"
        if isinstance(cause, UNREACHED):
            offline = constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled)
            return f"not in the local cache, and {no_hub(None if offline else first_line(chain[-1]))}"
        if isinstance(cause, HFValidationError):
            return f"{problem} (give a directory or a hub id 'owner/name')"
        if isinstance(cause, SafetensorError):
            return f"damaged weight file: {first}"
    return first


def no_hub(why: str | None = None) -> str:
    """The words for a hub that cannot be reached, and what to do; `why` is by default that it does not answer."""
    why = why or "it does not answer, or HF_HUB_OFFLINE is set"
    return f"the hub cannot be reached at {constants.ENDPOINT}: {why} (run epd-ray fetch where it can be)"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, because loaders wrap the hub's errors in their own."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _is_pickle(chain: list[BaseException]) -> bool:
    return any(type(error).__name__ == "UnpicklingError" for error in chain)  # torch has a class of this name, too


def first_line(error: BaseException) -> str:
    """The first line of an error's message.

    A line that ends with a colon is joined with the next one. A message of the hub starts with a status line, which is
    skipped; the two lines after it are joined. The home directory is written as ~.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if len(lines) > 1 and _STATUS.match(lines[0]):
        text = " ".join(lines[1:3])
    elif len(lines) > 1 and lines[0].endswith(":"):
        text = " ".join(lines[:2])
    else:
        text = lines[0]
    return text.replace(os.fspath(Path.home()), "~")
