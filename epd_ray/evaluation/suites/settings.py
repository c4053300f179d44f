"""What a suite is asked for, and a run's configuration with the suite's own defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from epd_ray.config.loading import RunConfig, apply_override, load_config, read_yaml
from epd_ray.config.sections import AUTO
from epd_ray.errors import ConfigError
from epd_ray.evaluation.suites.paper import FID_TABLES, REWARD_TABLES, TITLES
from epd_ray.prompts.splits import SHAPES
from epd_ray.solvers.zoo import applicable

SuiteName = Literal["paper", "paper-fid", "embedded", "prompts"]
INCEPTION = "inception"
CLIP = "clip"  # as head, which is the default one, and as extractor
FID_PICTURES = 50_000
OWN_HEADS = {head.partition(".")[0]: head for head in TITLES}
"""The suites' own heads: name in the configuration -> registry name."""
HEAD_CPUS = 0.1  # all of them and two rollout actors fit two cores


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
        suite: "paper" also brings those heads of its columns that the file and the overrides lack; "prompts" brings all
            of them for a model that is not embedded, where neither names a head.
        path: YAML, or None.
        overrides: "backbone.model=..." and the like.

    Raises:
        ConfigError: wrong settings, or a model that the suite is not for.
    """
    everyone = [name for name in applicable("ve") if name in applicable("flow")]
    defaults: dict[str, Any] = {"backbone": {"guidance_scale": None}, "evaluation": {"baselines": everyone}}
    config = load_config(path, [*_own_heads(suite, path, overrides), *overrides], defaults)
    if suite == "embedded" and config.backbone.model != SHAPES:
        raise ConfigError(
            [f"--suite embedded is for the embedded model, backbone.model is {config.backbone.model!r}: "
             "use --suite prompts FILE"]
        )  # fmt: skip
    if suite == "paper-fid":
        return config.model_copy(update={"rewards": {}})  # nothing to score against
    return config


def _own_heads(suite: SuiteName, path: Path | None, overrides: Sequence[str]) -> list[str]:
    """The heads that a suite brings, as overrides before the user's, which may tune them or say rewards={...} instead.

    A head that is written or asked for by its registry name, under whatever name, is not brought again.
    """
    written: dict[str, Any] = {} if path is None else read_yaml(path)
    named = {name: {"head": CLIP, **_mapping(head)} for name, head in _mapping(written.get("rewards")).items()}
    asked = {**written, "rewards": named}
    for override in overrides:
        apply_override(asked, override)
    heads = {name: _mapping(head) for name, head in _mapping(asked["rewards"]).items()}
    chosen = {name: head.get("head", CLIP) for name, head in heads.items() if "head" in head or name not in OWN_HEADS}
    backbone = _mapping(asked.get("backbone"))
    other_model = backbone.get("family", AUTO) == AUTO and backbone.get("model", SHAPES) != SHAPES
    if suite != "paper" and not (suite == "prompts" and other_model and not chosen):
        return []
    missing = {name: head for name, head in OWN_HEADS.items() if head not in chosen.values()}
    free = {f"paper_{name}" if name in chosen else name: head for name, head in missing.items()}
    return [f"rewards.{name}={{head: {head}, num_cpus: {HEAD_CPUS}}}" for name, head in free.items()]


def _mapping(value: object) -> dict[str, Any]:
    """What has no keys is refused with the rest of the configuration."""
    return value if isinstance(value, dict) else {}
