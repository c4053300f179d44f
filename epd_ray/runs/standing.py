"""Where a run stands when it is resumed: finished, or at a checkpoint whose settings are those that are asked for."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from epd_ray.config.deciding import START, changes
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.records import read_evaluation
from epd_ray.evaluation.verdict import closing
from epd_ray.prompts.splits import PromptSplits
from epd_ray.runs.lost import name_strangers, restoring
from epd_ray.runs.origin import ORIGIN, Origin, carried_on, origin_of, read_origin, started
from epd_ray.runs.saved import saved_prompts
from epd_ray.runs.state import require_state
from epd_ray.storage.checkpoint import changed_versions, load_newest
from epd_ray.storage.run_directory import RunDirectory, package_versions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """What a run goes on from.

    Attributes:
        prompts: the prompts with which it began.
        origin: what decides its results from here on.
        checkpoint: the state to go on from; None where the run begins anew.
        results: the results of a run that is finished, in a few lines; None of a run that goes on.
    """

    prompts: PromptSplits
    origin: Origin
    checkpoint: dict[str, Any] | None = None
    results: list[str] | None = None


def standing(
    name: str,
    run: RunDirectory,
    config: RunConfig,
    accept: Collection[str],
    elsewhere: Callable[[], Collection[int] | None] = lambda: None,
) -> Standing:
    """Find where a run stands, and check that nothing that decides its results has changed without consent.

    Args:
        name: the run, for messages.
        run: its directory.
        config: the configuration to go on with.
        accept: keys that may have another value than the run had so far.
        elsewhere: asks for the iterations of which a remote place holds rollouts; see `lost_iterations`.

    Raises:
        RunDirectoryError: a key has changed, or a file that the run needs cannot be read.
        ConfigError: a key to accept decides nothing.
    """
    prompts, held = saved_prompts(run), read_origin(run)
    now = origin_of(config, prompts)
    if (results := _results(run)) is not None and (
        held is None or not changes(held.settings, started(now, run).settings)
    ):
        return Standing(prompts, held or now, results=results)
    run.require_files()
    name_strangers(name, run)
    checkpoint = load_newest(run.checkpoints, require_state)
    if checkpoint is not None:
        _warn_of_other_versions(name, checkpoint["versions"])
        begun, now, iteration = ORIGIN.validate_python(checkpoint["origin"]), started(now, run), checkpoint["iteration"]
        if begun.settings == now.settings:  # with others, an earlier iteration would not be the same again
            checkpoint = restoring(name, run, checkpoint, elsewhere())
    elif held is not None:
        settings = {key: value for key, value in held.settings.items() if key != START}  # stage 1 runs again
        begun, iteration = Origin(settings, held.accepted), 0
    else:
        log.warning("%s is missing: the run begins anew with config.yaml as it stands", run.origin)
        return Standing(prompts, now)
    agreed = () if held is None else held.accepted
    return Standing(prompts, carried_on(name, begun, now.settings, iteration, accept, agreed), checkpoint)


def _warn_of_other_versions(name: str, versions: dict[str, str]) -> None:
    if changed := changed_versions(versions, package_versions()):
        log.warning(
            "the run %s began with other package versions (%s): the last bits of its numbers may differ from now on",
            name,
            changed,
        )


def _results(run: RunDirectory) -> list[str] | None:
    """The results of a run that has written its last two files; None where it has not, or cannot be read."""
    if not (run.stages.is_file() and run.report.is_file()):
        return None
    try:
        return closing(read_evaluation(run.evaluation))
    except RunDirectoryError as error:
        log.warning("%s: the comparison is made again", error)
        return None
