"""What a suite is asked for, and a run's configuration with the suite's own defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from epd_ray.config import RunConfig, load_config
from epd_ray.errors import ConfigError
from epd_ray.sections import SHAPES
from epd_ray.solvers.zoo import applicable
from epd_ray.suite.paper import FID_TABLES, REWARD_TABLES, TITLES

SuiteName = Literal["paper", "paper-fid", "embedded", "prompts"]
INCEPTION = "inception"


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        suite: which comparison.
        out: the results' directory; what is there already is kept.
        solvers: learned ones: directories, presets or hub ids.
        table: of the paper; None: by the model's family and resolution.
        count: number of prompts (of pictures, where there are no prompts); None: the suite's own.
        prompts: file, in place of the suite's own prompts.
        images_per_prompt: from different noise.
        features: what diversity and the Frechet distance see: "inception", or a CLIP model; None: the suite's own.
        reference: pictures or statistics that the Frechet distance is taken to.
    """

    suite: SuiteName
    out: Path
    solvers: tuple[str, ...] = ()
    table: str | None = None
    count: int | None = None
    prompts: Path | None = None
    images_per_prompt: int = 1
    features: str | None = None
    reference: Path | None = None

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ConfigError(problems)


def _problems(request: Request) -> Sequence[str]:
    """What cannot be, whatever the model."""
    suite, found = request.suite, []
    if request.images_per_prompt < 1:
        found.append(f"--images-per-prompt is {request.images_per_prompt}, at least 1 is needed")
    tables = {"paper": tuple(REWARD_TABLES), "paper-fid": FID_TABLES}.get(suite, ())
    if request.table is not None and request.table not in tables:
        choices = f"takes {', '.join(tables)}" if tables else "is for the suites paper and paper-fid"
        found.append(f"--table is {request.table!r}, with --suite {suite} it {choices}")
    if request.features is not None and request.reference is None and request.images_per_prompt == 1:
        found.append(
            "--features is for diversity and the Frechet distance: give --images-per-prompt 2 or more, or --reference"
        )
    if suite == "paper-fid":
        if request.table is None:
            found.append(f"--suite paper-fid needs --table: {', '.join(FID_TABLES)}")
        if request.reference is None:
            found.append(
                "--suite paper-fid needs --reference: a folder of the training set's pictures, or their statistics"
            )
        if request.prompts is not None or request.images_per_prompt > 1:
            found.append("--suite paper-fid draws without prompts: leave out --prompts and --images-per-prompt")
    if suite == "prompts" and request.prompts is None:
        found.append("--suite prompts needs a file: epd-ray evaluate --suite prompts FILE")
    if suite in ("embedded", "prompts") and not request.solvers:
        found.append(
            f"--suite {suite} compares a learned solver: give --solver RUN/solver, a preset (epd-ray tables list) or "
            "a hub id"
        )
    return found


def load_settings(suite: SuiteName, path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """A configuration as `train` reads it, but with the guidance that the family is usually used with, and all methods.

    Args:
        suite: "paper" also brings the heads of its columns.
        path: YAML, or None.
        overrides: "backbone.model=..." and the like.

    Raises:
        ConfigError: wrong settings, or a model that the suite is not for.
    """
    everyone = [name for name in applicable("ve") if name in applicable("flow")]
    defaults: dict[str, Any] = {"backbone": {"guidance_scale": None}, "evaluation": {"baselines": everyone}}
    if suite == "paper":
        defaults["rewards"] = {head.partition(".")[0]: {"head": head} for head in TITLES}
    config = load_config(path, overrides, defaults)
    if suite == "embedded" and config.backbone.model != SHAPES:
        raise ConfigError(
            [f"--suite embedded is for the embedded model, backbone.model is {config.backbone.model!r}: "
             "use --suite prompts FILE"]
        )  # fmt: skip
    if suite == "paper-fid":
        return config.model_copy(update={"rewards": {}})  # nothing to score against
    return config
