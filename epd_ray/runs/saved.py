"""What a run directory holds from the beginning of its run: the configuration and the prompts."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from epd_ray.config.loading import load_config, read_yaml
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import ConfigError, RunDirectoryError, importing
from epd_ray.prompts.splits import PromptSplits
from epd_ray.storage.places import Place, reading
from epd_ray.storage.run_directory import RunDirectory

_SPLITS = TypeAdapter(PromptSplits)


def open_run(place: Place, folder: Path) -> tuple[RunDirectory, RunConfig]:
    """The run in a place's local folder, and its configuration.

    Raises:
        RunDirectoryError: the folder holds no run.
        ConfigError: its configuration is not valid, or empty.
    """
    with reading(place, folder):
        run = RunDirectory.open(folder)
        if not read_yaml(run.config):  # every run writes every key: the defaults would be those of another run
            raise ConfigError([f"{run.config} is empty: put back the configuration of the run"])
        return run, load_config(run.config)


def saved_prompts(run: RunDirectory) -> PromptSplits:
    """The prompts with which a run began; a later change of the file that they came from does not matter.

    Raises:
        RunDirectoryError: the prompts are missing or damaged.
    """
    return read_splits(run.prompts)


def read_splits(path: Path) -> PromptSplits:
    """The prompts of a prompts.json.

    Raises:
        RunDirectoryError: the file is missing or damaged.
    """
    try:
        with importing(RunDirectoryError, path):
            return _SPLITS.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        why = error.strerror or str(error)
    except ValidationError as error:
        first = error.errors()[0]
        why = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part) + first["msg"]
    raise RunDirectoryError(f"{path} cannot be read ({why}): put it back from a copy, without it nothing can go on")
