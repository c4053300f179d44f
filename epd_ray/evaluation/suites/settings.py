"""What a suite is asked for, and how its configuration is read, which has other defaults than a training run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from epd_ray.config.loading import apply_override, load_config, read_yaml
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import AUTO, OPENED
from epd_ray.errors import ConfigError, shown
from epd_ray.evaluation.suites.paper import FID_TABLES, REWARD_TABLES, TITLES
from epd_ray.prompts.splits import SHAPES
from epd_ray.solvers.zoo import applicable

SuiteName = Literal["paper", "paper-fid", "embedded", "prompts"]
INCEPTION = "inception"
CLIP = "clip"  # both the name of the default reward head and that of a feature extractor
FID_PICTURES = 50_000
OWN_HEADS = {head.partition(".")[0]: head for head in TITLES}
"""The reward heads that a suite brings: name in the configuration -> registry name."""
HEAD_CPUS = 0.1  # so small that all of these heads and two rollout actors fit two cores


@dataclass(frozen=True)
class Request:
    """What a suite is asked to measure.

    Attributes:
        suite: the name of the suite.
        out: the directory of the results; results that are there already are kept.
        solvers: the learned solvers: directories, names of presets, or hub ids.
        table: the name of the paper's table; None chooses it by the model's family and resolution.
        count: the number of prompts, or of pictures for a model without prompts; None takes the suite's own number.
        prompts: a file of prompts; None takes the suite's own prompts.
        images_per_prompt: the number of pictures of each prompt, at least 1, which start from different noise.
        features: the network whose features diversity and the Frechet distance compare: "inception", or a CLIP model;
            None takes the suite's own.
        reference: a folder of pictures, or a file of their statistics, that the Frechet distance is measured to; None
            leaves that distance out.

    Raises:
        ConfigError: options that do not go together; the error has every problem.
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
    """What is wrong with a request whatever the model is, one line each."""
    suite, found = request.suite, []
    if request.images_per_prompt < 1:
        found.append(f"--images-per-prompt is {request.images_per_prompt}, at least 1 is needed")
    tables = {"paper": tuple(REWARD_TABLES), "paper-fid": FID_TABLES}.get(suite, ())
    if request.table is not None and request.table not in tables:
        choices = f"takes {', '.join(tables)}" if tables else "is for the suites paper and paper-fid"
        found.append(f"--table is {shown(request.table)}, with --suite {suite} it {choices}")
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
    """Read a configuration as `train` does, but with the family's usual guidance scale and all methods as rivals.

    Args:
        suite: the name of the suite. "paper" adds the reward heads of the paper's columns that the file and the
            overrides lack. "prompts" adds all of them if the model is not the embedded one and no head is named.
        path: a YAML file; None takes the defaults.
        overrides: changes such as "backbone.model=...".

    Raises:
        ConfigError: settings that are wrong, or a model that the suite is not for.
    """
    everyone = [name for name in applicable("ve") if name in applicable("flow")]
    defaults: dict[str, Any] = {"backbone": {"guidance_scale": None}, "evaluation": {"baselines": everyone}}
    config = load_config(path, [*_own_heads(suite, path, overrides), *overrides], defaults)
    if suite == "embedded" and config.backbone.model != SHAPES:
        raise ConfigError(
            [f"--suite embedded is for the embedded model, backbone.model is {shown(config.backbone.model)}: "
             "use --suite prompts FILE"]
        )  # fmt: skip
    if suite == "paper-fid":
        return config.model_copy(update={"rewards": {}})  # reward heads need prompts
    return config


def _own_heads(suite: SuiteName, path: Path | None, overrides: Sequence[str]) -> list[str]:
    """The reward heads that a suite adds, as overrides that come before the user's, which may change or replace them.

    A head that the file or the overrides name by its registry name is not added again.
    """
    written: dict[str, Any] = {} if path is None else read_yaml(path)
    named = {name: {"head": CLIP, **_mapping(head)} for name, head in _mapping(written.get("rewards")).items()}
    asked = {**written, "rewards": named}
    for override in overrides:
        apply_override(asked, override)
    heads = {name: _mapping(head) for name, head in _mapping(asked["rewards"]).items()}
    chosen = {name: head.get("head", CLIP) for name, head in heads.items() if "head" in head or name not in OWN_HEADS}
    backbone = _mapping(asked.get("backbone"))
    other_model = backbone.get("family", AUTO) in OPENED and backbone.get("model", SHAPES) != SHAPES
    if suite != "paper" and not (suite == "prompts" and other_model and not chosen):
        return []
    missing = {name: head for name, head in OWN_HEADS.items() if head not in chosen.values()}
    free = {f"paper_{name}" if name in chosen else name: head for name, head in missing.items()}
    return [f"rewards.{name}={{head: {head}, num_cpus: {HEAD_CPUS}}}" for name, head in free.items()]


def _mapping(value: object) -> dict[str, Any]:
    """The mapping itself, or an empty one for any other value, which is refused when the configuration is read."""
    return value if isinstance(value, dict) else {}
