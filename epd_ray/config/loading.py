"""A run's configuration: the defaults, a YAML file, overrides; all problems reported at once."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, get_args

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from epd_ray.config.sections import (
    AUTO,
    RESERVED_HEADS,
    BackboneConfig,
    CheckpointConfig,
    ClusterConfig,
    DistillConfig,
    EvaluationConfig,
    Name,
    PromptsConfig,
    RDPOSection,
    RewardConfig,
    Section,
    SolverConfig,
    StoreConfig,
    TrackingConfig,
)
from epd_ray.errors import ConfigError
from epd_ray.prompts.splits import BUILTIN, SHAPES
from epd_ray.registry import did_you_mean
from epd_ray.rewards.scoring import REFERENCE
from epd_ray.stage_one.combinations import too_many_combinations

FORMAT = 1

# What changes when the model is not the embedded one, unless the file or an override says otherwise.
FOR_OTHER_MODELS: dict[str, Any] = {
    "backbone": {"guidance_scale": None, "max_sequence_length": None},
    "solver": {"intervals": 10},
    "prompts": {"train": BUILTIN},
    "rewards": {"hpsv2": {"head": "hpsv2.1"}},
}


class RunConfig(Section):
    """Everything that decides a run."""

    format: int = Field(default=FORMAT, ge=1, le=FORMAT, description="of this file")
    name: Name = Field(default="shapes", description="ends the run directory's name")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of prompts, noise and policy")
    backbone: BackboneConfig = BackboneConfig()
    solver: SolverConfig = SolverConfig()
    prompts: PromptsConfig = PromptsConfig()
    rewards: dict[Name, RewardConfig] = Field(
        default={"clip": RewardConfig(options={"model": "shapes-clip"})}, min_length=1, description="heads by name"
    )
    distill: DistillConfig = DistillConfig()
    rdpo: RDPOSection = RDPOSection()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    store: StoreConfig = StoreConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("rewards")
    @classmethod
    def _free_names(cls, rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        taken = sorted(RESERVED_HEADS.intersection(rewards))
        if taken:
            raise ValueError(f"{taken[0]!r} is the name of another column or metric: call the head something else")
        return rewards

    @field_validator("rewards")
    @classmethod
    def _weighted(cls, rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        if not sum(reward.weight for reward in rewards.values()):
            raise ValueError("weights add up to 0, at least one head needs a positive weight")
        return rewards

    @field_validator("rdpo")
    @classmethod
    def _normalisable(cls, rdpo: RDPOSection, info: ValidationInfo) -> RDPOSection:
        unknown = [r.head for r in info.data.get("rewards", {}).values() if r.weight and r.head not in REFERENCE]
        if rdpo.normalisation == "reference" and unknown:
            raise ValueError(f"normalisation: the reference has none for {unknown[0]!r}, take zscore or none")
        return rdpo

    @field_validator("cluster")
    @classmethod
    def _encodable(cls, cluster: ClusterConfig, info: ValidationInfo) -> ClusterConfig:
        family = info.data.get("backbone", BackboneConfig()).family
        if cluster.encoder_actors and family != AUTO:
            raise ValueError(f"encoder_actors is 1, but family {family!r} has no text encoders that open apart: set 0")
        return cluster

    @field_validator("rdpo")
    @classmethod
    def _keeps_start_point(cls, rdpo: RDPOSection, info: ValidationInfo) -> RDPOSection:
        if rdpo.scale_time and info.data.get("solver", SolverConfig()).start_point:
            raise ValueError("scale_time would move the start point in time: set it false, or solver.start_point=false")
        return rdpo

    @field_validator("rdpo")
    @classmethod
    def _finds_its_scales(cls, rdpo: RDPOSection, info: ValidationInfo) -> RDPOSection:
        distill = info.data.get("distill", DistillConfig())
        scales = rdpo.scale_dir and distill.scale_range
        if rdpo.scale_time and _fits(distill) and distill.method == "gradient" and not scales:
            raise ValueError(
                "scale_time is found by gradient together with direction scales: set scale_dir true and "
                "distill.scale_range above 0, or distill.method=least_squares"
            )
        return rdpo

    @field_validator("rdpo")
    @classmethod
    def _has_something_to_learn(cls, rdpo: RDPOSection, info: ValidationInfo) -> RDPOSection:
        solver = info.data.get("solver", SolverConfig())
        if solver.points == 1 and solver.start_point and not rdpo.scale_dir:
            raise ValueError(
                "scale_dir is all that one point at the start has to learn: set it true, or solver.points to 2 or more"
            )
        return rdpo

    @field_validator("distill")
    @classmethod
    def _solvable(cls, distill: DistillConfig, info: ValidationInfo) -> DistillConfig:
        if not _fits(distill):
            return distill
        solver = info.data.get("solver", SolverConfig())
        points = solver.points
        if distill.grid < points:
            raise ValueError(f"grid is {distill.grid}, at least solver.points = {points} is needed")
        if problem := too_many_combinations(distill.grid, points, solver.start_point):
            raise ValueError(problem)
        if distill.min_weight * points >= 1:
            raise ValueError(
                f"min_weight is {distill.min_weight:g}, less than 1 / solver.points = {1 / points:g} is needed"
            )
        if distill.method == "gradient" and solver.start_point and (solver.order > 1 or solver.afs):
            raise ValueError(
                "method gradient follows no multistep or analytic slope from a start point: set least_squares, or "
                "solver.start_point=false"
            )
        return distill


def _fits(distill: DistillConfig) -> bool:
    """Whether stage 1 runs."""
    return distill.enabled and distill.table is None


def load_config(
    path: Path | None, overrides: Sequence[str] = (), assumed: Mapping[str, Any] = MappingProxyType({})
) -> RunConfig:
    """The defaults, changed by a YAML file, changed by overrides.

    Args:
        path: a mapping of sections; None for the defaults. Paths inside are relative to the working directory.
        overrides: "rdpo.lr=1e-3" and the like; values are YAML.
        assumed: sections with what the file is taken to say where it says nothing.

    Raises:
        ConfigError: every problem there is, one line each.
    """
    given = {} if path is None else read_yaml(path)
    _require_format(path, given.get("format", FORMAT))
    return resolve(_fill(dict(assumed), given), overrides)


def resolve(given: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """`load_config` for what a file holds."""
    written = {k: v for k, v in given.items() if v is not None}
    data = _fill(_defaults(written, overrides), written)
    problems = [problem for override in overrides if (problem := apply_override(data, override))]
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        problems += problems_of(error)
    if problems:
        raise ConfigError(problems)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration: every key, in order; `load_config` reads it back."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Text that `read_yaml` reads back."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def first_difference(before: RunConfig, now: RunConfig) -> str | None:
    """The first key whose value differs, with both: "rdpo.lr was 0.002, now 0.001"."""
    return first_change(before.model_dump(mode="json"), now.model_dump(mode="json"))


def first_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """See first_difference, of any nested values."""
    old, new = _flat(before), _flat(now)
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            return f"{key} was {_shown(old.get(key))}, now {_shown(new.get(key))}"
    return None


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _defaults(written: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Every key's default, for the model that the file and the overrides name."""
    asked = copy.deepcopy(written)
    for override in overrides:
        apply_override(asked, override)
    backbone = asked.get("backbone")
    backbone = backbone if isinstance(backbone, dict) else {}
    defaults = RunConfig().model_dump(mode="json")
    if backbone.get("family", AUTO) == AUTO and backbone.get("model", SHAPES) != SHAPES:
        defaults = _fill(defaults, FOR_OTHER_MODELS)
        defaults["name"] = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(str(backbone["model"])).name).strip("-") or "run"
    named = set(asked["rewards"]) if isinstance(asked.get("rewards"), dict) else set()
    if named - set(defaults["rewards"]):  # other heads than the default one: it stays only where it is named too
        defaults["rewards"] = {name: head for name, head in defaults["rewards"].items() if name in named}
    return defaults


def _fill(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Sections keep the defaults of what they leave out; heads given replace the default one."""
    merged = dict(defaults)
    for key, value in given.items():
        section = key != "rewards" and isinstance(value, dict) and isinstance(defaults.get(key), dict)
        merged[key] = {**defaults[key], **value} if section else value
    return copy.deepcopy(merged)  # overrides are written into it


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, as YAML 1.2 does."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart: text that would read as such a number is quoted."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(  # type: ignore[no-untyped-call]
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's sections as they are written.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError([f"cannot read the configuration {path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8 ({error.reason}); save the file as UTF-8"]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{path} is not YAML: {_yaml_problem(error)}"]) from error
    if data is not None and not isinstance(data, dict):
        raise ConfigError([f"{path} holds {_shown(data)}, expected a mapping of sections (backbone, solver, ...)"])
    return {str(key): value for key, value in (data or {}).items()}


def _require_format(path: Path | None, found: object) -> None:
    """A newer format may hold keys that would be called unknown: that is what is wrong with it, and no more."""
    if isinstance(found, int) and found > FORMAT:
        raise ConfigError(
            [f"{path} was written by a newer epd_ray (format {found}, this one reads up to {FORMAT}): update epd_ray"]
        )


def apply_override(data: dict[str, Any], override: str) -> str | None:
    """Put "a.b=value" into nested mappings; what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        return f"{override}: expected key=value, such as rdpo.lr=1e-3"
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        return f"{key}: {text!r} is not YAML: {_yaml_problem(error)}"
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents, start=1):
        node[part] = {} if node.get(part) is None else node[part]  # null: a section that is off by default
        node = node[part]
        if not isinstance(node, dict):
            return f"{key}: {'.'.join(parents[:depth])} is {_shown(node)}, which has no keys"
    node[last] = value
    return None


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).split())


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_EXPECTED = {
    "greater_than": "more than {gt:.15g} is needed",
    "greater_than_equal": "at least {ge:.15g} is needed",
    "less_than": "less than {lt:.15g} is needed",
    "less_than_equal": "at most {le:.15g} is possible",
    "too_short": "at least {min_length} is needed",
    "model_type": "expected a mapping of keys",
    "tuple_type": "expected a list, such as [a, b]",
    "string_type": "expected text",
    "string_pattern_mismatch": "expected letters, digits, - and _ alone",
}


def problems_of(error: ValidationError, owner: type[Section] = RunConfig) -> list[str]:
    """What is wrong, one line each."""
    return [_problem(details, owner) for details in error.errors()]


def _problem(error: ErrorDetails, whole: type[Section]) -> str:
    """One line: the key, its value, what is expected."""
    location, context = [str(part) for part in error["loc"] if part != "[key]"], error.get("ctx", {})
    key, kind = ".".join(location), error["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(location, whole)}"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    if kind == "literal_error":
        choices = re.findall(r"'(.*?)'", context["expected"])
        return f"{key}: unknown {_shown(error['input'])}{did_you_mean(str(error['input']), choices)}"
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else error["msg"]
    value = "null" if error["input"] is None else _shown(error["input"])
    return f"{key}: is {value}, {expected.replace('Input should be', 'expected')}"


def _nearest_key(location: Sequence[str], whole: type[Section]) -> str:
    *parents, key = location
    owner: Any = whole
    for part in parents:  # a section's key, or a name in a mapping of sections
        owner = _fields(owner)[part].annotation if _fields(owner) else get_args(owner)[1]
    homes = [f"{name}.{key}" for name, field in whole.model_fields.items() if key in _fields(field.annotation)]
    named = " or ".join(map(repr, homes))
    return f"; did you mean {named}?" if homes and not parents else did_you_mean(key, _fields(owner))


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    if isinstance(annotation, UnionType):  # a section, or null
        annotation = get_args(annotation)[0]
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation.model_fields if is_section else {}
