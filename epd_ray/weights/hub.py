"""Opening models from directories or the hub: every way that goes wrong ends in one line that says what to do."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the client it is built on, whatever its name
from safetensors import SafetensorError

from epd_ray.errors import ModelError, is_own_bug

UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, EOFError, httpx.HTTPError,
)  # fmt: skip
"""What the loaders of diffusers, transformers and torch raise for missing or damaged files, and broken downloads."""

TOKEN = "set HF_TOKEN to a read token of that account (named in cluster.env for actors on other machines)"

HUB_FAILURES = (OSError, HFValidationError, httpx.HTTPError)
"""What the hub's client raises for names, rights, connections and files."""

_STATUS = re.compile(r"\d{3} Client Error|\(Request ID")


@contextmanager
def opening(model: str, kind: str = "model") -> Iterator[None]:
    """Turn whatever a loader raises into one line; mistakes of this package's own code pass as they are.

    Args:
        model: directory or hub id, as the user gave it.
        kind: what it is ("CLIP model"), for the message.

    Raises:
        ModelError: names the model, what is wrong, and what to do about a gated, private or unreachable one.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        chain = list(_causes(error))
        if is_own_bug(error) or (not _unpickling(chain) and not any(isinstance(e, UNREADABLE) for e in chain)):
            raise
        raise ModelError(f"{kind} {model!r} cannot be opened: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """What went wrong and what to do about it, in one line.

    Args:
        error: of a loader or of the hub's client; what led to it counts too.
    """
    chain = list(_causes(error))
    first = first_line(error)
    if _unpickling(chain):
        return f"its checkpoint is a plain pickle, which could run code (convert it to safetensors): {first}"
    for cause in chain:
        said = first_line(cause)
        if isinstance(cause, GatedRepoError):
            return f"{said} (accept its licence on the model's page while logged in, then {TOKEN})"
        if isinstance(cause, RevisionNotFoundError):
            return f"{said} (check the revision: a branch, a tag or a commit)"
        if isinstance(cause, RepositoryNotFoundError):
            return f"{said} (check the name; for a private model, {TOKEN})"
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            return f"{said} ({TOKEN})"
        if isinstance(cause, RemoteEntryNotFoundError):
            return f"{said} (the repository has no such file: give one in its library's own layout)"
        if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return f"{said} (not in the local cache and the hub cannot be reached: epd-ray fetch where it can)"
        if isinstance(cause, HFValidationError):
            return f"{said} (give a directory or a hub id 'owner/name')"
        if isinstance(cause, SafetensorError):
            return f"damaged weight file: {first}"
    return first


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it; loaders wrap the hub's errors in their own."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _unpickling(chain: list[BaseException]) -> bool:
    return any(type(error).__name__ == "UnpicklingError" for error in chain)  # torch's own and pickle's


def first_line(error: BaseException) -> str:
    """What the message says first; of the hub's, past the status line, the two lines that name what and why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if len(lines) > 1 and _STATUS.match(lines[0]):
        text = " ".join(lines[1:3])
    elif len(lines) > 1 and lines[0].endswith(":"):
        text = " ".join(lines[:2])
    else:
        text = lines[0]
    return text.replace(os.fspath(Path.home()), "~")
