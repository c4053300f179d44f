"""What a run directory holds from the beginning of its run: the configuration and the prompts."""

import json
from pathlib import Path

from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import RunDirectoryError
from epd_ray.prompts.splits import PromptSplits
from epd_ray.storage.places import Place, reading
from epd_ray.storage.run_directory import RunDirectory


def open_run(place: Place, folder: Path) -> tuple[RunDirectory, RunConfig]:
    """The run in a place's local folder, and its configuration.

    Raises:
        RunDirectoryError: the folder holds no run.
        ConfigError: its configuration is not valid.
    """
    with reading(place, folder):
        run = RunDirectory.open(folder)
        return run, load_config(run.config)


def saved_prompts(run: RunDirectory) -> PromptSplits:
    """The prompts with which a run began; a later change of the file that they came from does not matter.

    Raises:
        RunDirectoryError: the prompts are missing or damaged.
    """
    try:
        return PromptSplits(**json.loads(run.prompts.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{run.prompts} cannot be read ({error}): the run cannot go on") from error
