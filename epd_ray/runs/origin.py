"""The settings that a run began with, against those that it is resumed with, and the changes that its user accepted.

They stand in origin.json from the beginning of the run, and in each checkpoint, which counts where there is one.
"""

import difflib
import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from epd_ray.config.deciding import PROMPTS, START, Change, Settings, changes, deciding
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import ConfigError, RunDirectoryError
from epd_ray.prompts.splits import PromptSplits
from epd_ray.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

SHOWN = 20  # changes in a message
DIGITS = 12  # of a file's digest, which are enough to tell two files apart


@dataclass(frozen=True)
class Accepted:
    """A change that the user of a run accepted.

    Attributes:
        iteration: the number of updates before the change.
        key: the key.
        before: its value until then.
        now: its value since then.
    """

    iteration: int
    key: str
    before: JsonValue
    now: JsonValue

    def __str__(self) -> str:
        return f"{Change(self.key, self.before, self.now)}, accepted after iteration {self.iteration}"


@dataclass(frozen=True)
class Origin:
    """What decides the results of a run.

    Attributes:
        settings: each deciding key with its value, and a digest of each deciding file.
        accepted: the changes so far, in order.
    """

    settings: Settings
    accepted: tuple[Accepted, ...] = ()

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, or for JSON."""
        return asdict(self)

    def text(self) -> str:
        """The text of origin.json."""
        return json.dumps(self.state(), indent=1, ensure_ascii=False) + "\n"


ORIGIN = TypeAdapter(Origin)


def origin_of(config: RunConfig, prompts: PromptSplits) -> Origin:
    """What decides the results of a run that begins with this configuration and these prompts."""
    splits = {f"{PROMPTS}:{split}": _prompts_digest(texts) for split, texts in prompts.splits.items()}
    rows = {f"{PROMPTS}:rows": _rows_digest(prompts)} if prompts.rows else {}
    return Origin({**deciding(config), **splits, **rows})


def started(origin: Origin, run: RunDirectory) -> Origin:
    """The origin with a digest of the solver that training starts from, which stage 1 has written by now."""
    file = run.distilled / "solver.json"
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read ({error.strerror}): put it back") from error
    return replace(origin, settings={**origin.settings, START: f"sha256 {digest}"})


def _prompts_digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:DIGITS]
    return f"{len(texts)} prompts (sha256 {digest})"


def _rows_digest(prompts: PromptSplits) -> str:
    digest = hashlib.sha256(json.dumps(dict(prompts.rows), sort_keys=True).encode()).hexdigest()[:DIGITS]
    return f"{len(prompts.rows)} rows (sha256 {digest})"


def read_origin(run: RunDirectory) -> Origin | None:
    """What origin.json says; None where there is no such file, as in a run of an older version.

    Raises:
        RunDirectoryError: the file cannot be read.
    """
    if not run.origin.exists():
        return None
    try:
        return ORIGIN.validate_json(run.origin.read_bytes())
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise RunDirectoryError(
            f"{run.origin} cannot be read ({why}): put it back, or delete it to take config.yaml as it stands"
        ) from error


def require_known(accept: Collection[str], *settings: Settings) -> None:
    """Check that the keys after --accept are among those that decide the results of a run.

    Raises:
        ConfigError: one is not.
    """
    known = {key for keys in settings for key in keys}
    if wrong := [key for key in accept if key not in known]:
        near = difflib.get_close_matches(wrong[0], known, n=1)
        fix = f"; did you mean {near[0]!r}?" if near else " (such keys can be changed freely, or do not exist)"
        raise ConfigError([f"--accept {wrong[0]}: no such key decides the results of this run{fix}"])


def carried_on(
    name: str, begun: Origin, now: Settings, iteration: int, accept: Collection[str], agreed: Sequence[Accepted] = ()
) -> Origin:
    """The origin of a run that goes on, with the changes that are accepted.

    Args:
        name: the run, for messages.
        begun: what decided the run up to here.
        now: the settings that decide it from here on.
        iteration: the number of updates so far.
        accept: the keys whose change is accepted.
        agreed: changes that were accepted before, and may have come after the last checkpoint.

    Raises:
        RunDirectoryError: a key has changed that cannot, or whose change is not accepted.
        ConfigError: a key to accept decides nothing.
    """
    require_known(accept, begun.settings, now)
    found = changes(begun.settings, now)
    known = [Change(change.key, change.before, change.now) for change in agreed]
    stuck = [change for change in found if change.obstacle]
    open_ = [change for change in found if change.key not in accept and change not in known]
    if stuck:
        raise RunDirectoryError(
            f"{name} began with other settings: {listed_changes(found)}. {stuck[0].key} cannot change in a run that "
            f"has begun ({stuck[0].obstacle}): put it back, or begin a new run"
        )
    if open_:
        options = " ".join(f"--accept {change.key}" for change in open_[:SHOWN])
        raise RunDirectoryError(
            f"{name} began with other settings: {listed_changes(open_)}. Put them back, or accept what changes from "
            f"here on: {options}"
        )
    taken = tuple(Accepted(iteration, change.key, change.before, change.now) for change in found)
    for change in taken:
        log.warning("%s: %s", name, change)  # each time that it is resumed from before the change
    return Origin(now, (*begun.accepted, *taken))


def listed_changes(found: Sequence[Change]) -> str:
    """The first SHOWN changes in a line, with the number of the others."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(map(str, found[:SHOWN])) + more
