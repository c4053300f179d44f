"""The settings that a sweep began with, against those that it is resumed with, because its trials are compared."""

from pathlib import Path

from epd_ray.config.deciding import changes
from epd_ray.config.problems import flat
from epd_ray.errors import RunDirectoryError
from epd_ray.prompts.splits import PromptSplits
from epd_ray.runs.origin import Origin, listed_changes, origin_of, read_origin
from epd_ray.storage.run_directory import RunDirectory
from epd_ray.sweep.space import Plan

FREE = "concurrent"  # how many trials run at a time may change


def begun_with(plan: Plan, prompts: PromptSplits) -> Origin:
    """What decides the results of a sweep: the deciding settings of its runs, and its own section."""
    section = plan.sweep.model_dump(mode="json", exclude_none=True, exclude={FREE})
    return Origin({**origin_of(plan.config, prompts).settings, **flat({"sweep": section})})


def require_as_begun(path: Path, plan: Plan, prompts: PromptSplits) -> None:
    """Check that nothing that decides has changed since the sweep began; one of an older version goes unchecked.

    Args:
        path: the directory of the sweep, with its origin.json.
        plan: the plan to go on with.
        prompts: the prompts to go on with.

    Raises:
        RunDirectoryError: a key has changed, or origin.json cannot be read.
    """
    begun = read_origin(RunDirectory(path))
    if begun is not None and (found := changes(begun.settings, begun_with(plan, prompts).settings)):
        raise RunDirectoryError(
            f"{path} began with other settings: {listed_changes(found)}. Put them back, or begin a new sweep"
        )
