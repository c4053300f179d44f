"""A run's configuration: typed, every default in one place, all problems reported at once.

The defaults are the run that `epd-ray train` makes on the embedded model.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from epd_ray.backbones import BACKBONES
from epd_ray.errors import ConfigError
from epd_ray.registry import Registry, did_you_mean
from epd_ray.rewards import HEADS

SHAPES = "shapes"
RESERVED_HEADS = {"mean", "group_std", "silent_groups", "solver", "prompt", "noise_seed", "scene_accuracy"}

Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # safe in paths, columns and metrics


def _registered(registry: Registry[Any], name: str) -> str:
    if ":" not in name and name not in registry.names():
        raise ValueError(f"unknown {registry.kind} {name!r}{did_you_mean(name, registry.names())}")
    return name


class _Section(BaseModel):
    # strict: "8" and true are no integers. validate_default: the validators below also judge what was left out.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class BackboneConfig(_Section):
    """Which frozen model is driven, and how."""

    family: str = Field(default="sd3", description="a backbone's registry name, or module:Class")
    model: str = Field(default=SHAPES, description="pipeline directory, hub id, or an embedded model's name")
    guidance_scale: Amount = Field(default=7.0, description="weight of the prompt; at most 1 means no guidance")
    resolution: int | None = Field(
        default=None, ge=8, multiple_of=8, description="pixels per side; null: the model's own"
    )
    device: str = Field(default="auto", description="auto (cuda, mps, cpu), or a torch device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="of the network")
    # T5 tokens. Without T5 the pipeline pads with empty ones, which the transformer computes all the same.
    max_sequence_length: int = Field(default=20, ge=1, le=512, description="T5 tokens a prompt")
    embedding_cache_mib: int = Field(default=1024, ge=0, description="bound on the cached prompt embeddings")
    options: dict[str, JsonValue] = Field(default={}, description="constructor arguments of a family other than sd3")

    @field_validator("family")
    @classmethod
    def _known(cls, family: str) -> str:
        return _registered(BACKBONES, family)

    @field_validator("options")
    @classmethod
    def _for_others(cls, options: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if options and info.data.get("family") == "sd3":
            raise ValueError(f"{', '.join(options)} given, but family sd3 has its own keys (set backbone.<key>)")
        return options

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the backbone's constructor."""
        if self.family == "sd3":
            return self.model_dump(exclude={"family", "guidance_scale", "options"})
        named = {} if self.model == SHAPES else {"model": self.model}
        return {**named, **self.options}


class SolverConfig(_Section):
    """The solver's shape: N intervals of K points."""

    intervals: int = Field(default=2, ge=1, le=1000, description="N")
    points: int = Field(default=2, ge=1, le=64, description="K, evaluated in one batch")
    afs: bool = Field(default=False, description="analytical first step: one evaluation less")
    order: int = Field(default=1, ge=1, le=4, description="of the multistep slope that leads to the points")


class PromptsConfig(_Section):
    """Training prompts, and those held out."""

    train: str = Field(default=SHAPES, description="shapes, or a .txt file with one prompt a line")
    num_train: Positive = Field(default=256, description="training prompts of shapes; a file gives all that it holds")
    validation: Positive = Field(default=48, description="prompts that choose the best table")
    test: Positive = Field(default=128, description="prompts that the result is reported on")
    two_things: float = Field(default=0.5, ge=0, le=1, description="share of shapes with two objects")

    @field_validator("train")
    @classmethod
    def _source(cls, train: str) -> str:
        if train != SHAPES and not train.endswith(".txt"):
            raise ValueError(f"is {train!r}, expected {SHAPES!r} or the path of a .txt file")
        return train


class RewardConfig(_Section):
    """One head of the mix: weight * clip((value + shift) / scale, low, high), and its actors."""

    head: str = Field(default="clip", description="a head's registry name, or module:Class")
    options: dict[str, JsonValue] = Field(default={}, description="the head's constructor arguments")
    weight: Amount = Field(default=1.0, description="share in the mix, relative to the other heads")
    shift: float = Field(default=0.0, description="added to the raw value")
    scale: float = Field(default=1.0, gt=0, description="divides the shifted value")
    low: float | None = Field(default=None, description="lower bound of the result")
    high: float | None = Field(default=None, description="upper bound of the result")
    replicas: Positive = Field(default=1, description="number of actors")
    num_cpus: Amount = Field(default=0.25, description="per actor")
    num_gpus: Amount = Field(default=0.0, description="per actor")
    resources: dict[str, Amount] = Field(default={}, description="custom Ray resources per actor")

    @field_validator("head")
    @classmethod
    def _known(cls, head: str) -> str:
        return _registered(HEADS, head)

    @field_validator("high")
    @classmethod
    def _above_low(cls, high: float | None, info: ValidationInfo) -> float | None:
        low = info.data.get("low")
        if high is not None and low is not None and high <= low:
            raise ValueError(f"is {high:g}, more than low ({low:g}) is needed")
        return high


class DistillConfig(_Section):
    """Stage 1: least squares against a finer solver."""

    enabled: bool = Field(default=True, description="false: start from evenly spaced points of equal weight")
    table: str | None = Field(default=None, description="a solver directory to start from instead")
    prompts: Positive = Field(default=32, description="training prompts that are followed")
    grid: Positive = Field(default=11, description="positions tried per interval")
    teacher_steps: Positive = Field(default=6, description="the teacher's steps per interval")
    min_weight: float = Field(
        default=0.05, ge=0.001, lt=1, description="smallest weight of a point, so that it can be drawn"
    )


class RDPOSection(_Section):
    """Stage 2: the policy and its update."""

    iterations: int = Field(default=45, ge=0, description="updates; 0 keeps the table of stage 1")
    prompts_per_iteration: Positive = Field(default=8, description="P")
    group_size: int = Field(default=4, description="G, images per prompt")
    same_latent: bool = Field(default=True, description="images of a group share their noise")
    baseline: Literal["per_prompt", "mixed"] = Field(default="per_prompt", description="mixed: the reference's")
    lr: float = Field(default=2e-3, gt=0, le=1, description="of AdamW")
    weight_decay: Amount = Field(default=0.01, description="of AdamW")
    clip: float = Field(default=0.2, gt=0, lt=1, description="epsilon of the clipped surrogate")
    epochs: Positive = Field(default=1, description="passes over an iteration's images")
    minibatch: Positive = Field(default=16, description="images per gradient step")
    grad_clip: float = Field(default=1.0, gt=0, description="bound on the gradient's norm")
    kl_coeff: Amount = Field(default=0.0, description="weight of the KL to the table of stage 1")
    entropy_coeff: Amount = Field(default=0.0, description="weight of the entropy")
    concentration: float = Field(default=30.0, gt=0, description="total Dirichlet concentration at the start")
    concentration_bound: float = Field(default=5.0, ge=1, description="its largest value, times the start")
    scale_dir: bool = Field(default=False, description="train direction scales too")
    scale_time: bool = Field(default=False, description="train time scales too")
    hidden_width: Positive = Field(default=128, description="of the policy network")
    hidden_depth: Positive = Field(default=2, description="of the policy network")
    staleness: int = Field(default=1, ge=0, description="updates a rollout's policy may be old; 0: fully synchronous")

    @field_validator("group_size")
    @classmethod
    def _leaves_one_out(cls, size: int) -> int:
        if size < 2:
            raise ValueError(f"is {size}, at least 2 is needed (leave-one-out compares the images of a group)")
        return size

    @field_validator("minibatch")
    @classmethod
    def _fits(cls, minibatch: int, info: ValidationInfo) -> int:
        prompts, size = info.data.get("prompts_per_iteration"), info.data.get("group_size")
        if prompts and size and minibatch > prompts * size:
            raise ValueError(
                f"is {minibatch}, at most prompts_per_iteration * group_size = {prompts * size} is possible"
            )
        return minibatch


class EvaluationConfig(_Section):
    """What the learned solver is compared with."""

    every: Positive = Field(default=5, description="iterations between validations")
    baselines: tuple[Literal["euler", "heun", "dpm2", "ipndm"], ...] = Field(
        default=("euler", "heun", "dpm2", "ipndm"), strict=False, description="at the same parallel NFE"
    )
    equal_evals: bool = Field(default=True, description="also at the same total evaluations")
    pictures: int = Field(default=8, ge=0, description="rows of the contact sheet")


class ClusterConfig(_Section):
    """Where the actors run and what they ask for. The defaults fit two cores with one reward actor."""

    address: str | None = Field(default=None, description="of a Ray cluster; null: a local one on loopback")
    rollout_actors: int = Field(default=2, ge=0, description="0: in the driver")
    rollout_cpus: Amount = Field(default=0.75, description="per actor")
    rollout_gpus: Amount = Field(default=0.0, description="per actor")
    rollout_resources: dict[str, Amount] = Field(default={}, description="custom Ray resources per actor")
    images_per_job: Positive = Field(default=8, description="batch of one call, whatever the number of actors")
    learner_actors: int = Field(default=1, ge=0, le=1, description="0: in the driver")
    learner_cpus: Amount = Field(default=0.25, description="of the learner")
    learner_gpus: Amount = Field(default=0.0, description="of the learner")


class CheckpointConfig(_Section):
    """What a resumed run continues from."""

    every: Positive = Field(default=5, description="iterations between checkpoints")
    keep: Positive = Field(default=3, description="newest ones that stay on disk")


class RunConfig(_Section):
    """Everything that decides a run."""

    name: Name = Field(default="shapes", description="ends the run directory's name")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of prompts, noise and policy")
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

    @field_validator("distill")
    @classmethod
    def _solvable(cls, distill: DistillConfig, info: ValidationInfo) -> DistillConfig:
        solver = info.data.get("solver", SolverConfig())
        points = solver.points
        if distill.enabled and distill.table is None and (solver.afs or solver.order > 1):
            raise ValueError("fits plain EPD only: set distill.enabled=false with solver.afs or solver.order > 1")
        if distill.grid < points:
            raise ValueError(f"grid is {distill.grid}, at least solver.points = {points} is needed")
        if distill.min_weight * points >= 1:
            raise ValueError(
                f"min_weight is {distill.min_weight:g}, less than 1 / solver.points = {1 / points:g} is needed"
            )
        return distill


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The defaults, changed by a YAML file, changed by overrides.

    Args:
        path: a mapping of sections; None for the defaults. Paths inside are relative to the working directory.
        overrides: "rdpo.lr=1e-3" and the like; values are YAML.

    Raises:
        ConfigError: every problem there is, one line each.
    """
    written = {} if path is None else _read(path)
    # Sections are filled up by their own defaults; the file's heads replace the default one.
    data = {**RunConfig().model_dump(mode="json"), **{k: v for k, v in written.items() if v is not None}}
    problems = [problem for override in overrides if (problem := _apply(data, override))]
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        problems += [_problem(details) for details in error.errors()]
    if problems:
        raise ConfigError(problems)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration: every key, in order; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(path: Path) -> dict[str, Any]:
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


def _apply(data: dict[str, Any], override: str) -> str | None:
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
        node = node.setdefault(part, {})
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
    "greater_than": "more than {gt:g} is needed",
    "greater_than_equal": "at least {ge:g} is needed",
    "less_than": "less than {lt:g} is needed",
    "less_than_equal": "at most {le:g} is possible",
    "too_short": "at least {min_length} is needed",
    "model_type": "expected a mapping of keys",
    "string_pattern_mismatch": "expected letters, digits, - and _ alone",
}


def _problem(error: ErrorDetails) -> str:
    """One line: the key, its value, what is expected."""
    location, context = [str(part) for part in error["loc"] if part != "[key]"], error.get("ctx", {})
    key, kind = ".".join(location), error["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(location)}"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    if kind == "literal_error":
        choices = re.findall(r"'(.*?)'", context["expected"])
        return f"{key}: unknown {_shown(error['input'])}{did_you_mean(str(error['input']), choices)}"
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else error["msg"]
    return f"{key}: is {_shown(error['input'])}, {expected.replace('Input should be', 'expected')}"


def _nearest_key(location: Sequence[str]) -> str:
    *parents, key = location
    owner: Any = RunConfig
    for part in parents:  # a section's key, or a name in a mapping of sections
        owner = _fields(owner)[part].annotation if _fields(owner) else get_args(owner)[1]
    homes = [f"{name}.{key}" for name, field in RunConfig.model_fields.items() if key in _fields(field.annotation)]
    return f"; did you mean {homes[0]!r}?" if homes and not parents else did_you_mean(key, _fields(owner))


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    is_section = isinstance(annotation, type) and issubclass(annotation, _Section)
    return annotation.model_fields if is_section else {}
