"""The sections of a run's configuration: every key with its type, bounds, default and meaning.

The defaults are the run that `epd-ray train` makes on the embedded model.
"""

import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from epd_ray.backbones import BACKBONES
from epd_ray.errors import UnknownNameError
from epd_ray.policy.minibatches import minibatch_problem
from epd_ray.prompts.files import SUFFIXES
from epd_ray.prompts.splits import BUILTIN, SHAPES
from epd_ray.registry import Registry, did_you_mean
from epd_ray.rewards import HEADS
from epd_ray.solvers.zoo import SOLVERS, split

AUTO = "auto"
RESERVED_HEADS = {
    *("mean", "group_std", "silent_groups", "solver", "prompt", "noise_seed", "scene_accuracy", "iteration", "reward"),
    *("low", "high", "gain", "gain_low", "gain_high", "best", "stalled"),
    *("sampler", "prompt_id", "image", "shard", "session", "seconds"),
    *("sharpness", "features", "diversity", "frechet_distance"),
}

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TOKEN = re.compile(r"hf_|[0-9a-f]{40}")  # of Hugging Face and of Weights & Biases, which could be names too
SECRET = re.compile("key|token|secret|password", re.IGNORECASE)  # in the names of keys


def _holds_secret(url: str) -> bool:
    """Whether a URL has a login, or a query key such as token."""
    address, _, query = url.partition("?")
    return "@" in address or any(SECRET.search(name) for name, _ in parse_qsl(query, keep_blank_values=True))


def _names_variable(name: Any) -> bool:
    return isinstance(name, str) and VARIABLE.fullmatch(name) is not None and not TOKEN.match(name)


def _gpus(amount: float) -> float:
    if amount > 1 and amount != int(amount):
        raise ValueError(f"is {amount:g}, a share of one GPU (below 1) or a whole number is possible")
    return amount


def _custom(resources: dict[str, float]) -> dict[str, float]:
    taken = sorted({"CPU", "GPU"} & set(resources))
    if taken:
        raise ValueError(f"{taken[0]} is no custom resource: set the key for {taken[0]}s beside it")
    return resources


Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Gpus = Annotated[float, Field(ge=0), AfterValidator(_gpus)]
CustomResources = Annotated[dict[str, Amount], AfterValidator(_custom)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # safe in paths, columns and metrics


def _registered(registry: Registry[Any], name: str) -> str:
    if ":" not in name and name not in registry.names():
        raise ValueError(f"unknown {registry.kind} {name!r}{did_you_mean(name, registry.names())}")
    return name


def _solver(name: str) -> str:
    try:
        method, _ = split(name)
    except UnknownNameError as error:
        raise ValueError(str(error)) from None
    _registered(SOLVERS, method)
    return name


class Section(BaseModel):
    # strict: "8" and true are no integers. validate_default: the validators below also judge what was left out.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class BackboneConfig(Section):
    """Which frozen model is driven, and how."""

    family: str = Field(default="auto", description="auto: by the pipeline's own index; a registry name; module:Class")
    model: str = Field(default=SHAPES, description="pipeline directory, hub id, or an embedded model's name")
    revision: str | None = Field(default=None, description="of a hub repository: branch, tag or commit")
    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(
        default=7.0, description="weight of the prompt, at most 1: no guidance; null: the family's usual one"
    )
    resolution: int | None = Field(
        default=None, ge=8, multiple_of=8, description="pixels per side; null: the model's own"
    )
    device: str = Field(default="auto", description="auto (cuda, mps, cpu), or a torch device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the network; auto: bfloat16 where it is native"
    )
    # Without T5 the pipeline pads with empty tokens, which the embedded transformer computes all the same: so 20 there.
    max_sequence_length: int | None = Field(
        default=20, ge=1, le=512, description="T5 tokens a prompt; null: the pipeline's own number"
    )
    offload: Literal["none", "model", "sequential"] = Field(
        default="none", description="keep on the device what is at work alone (needs accelerate)"
    )
    vae_slicing: bool = Field(default=False, description="decode one image at a time")
    vae_tiling: bool = Field(default=False, description="decode in tiles")
    compile: bool = Field(default=False, description="torch.compile the denoising network")
    attention: str | None = Field(default=None, description="a diffusers attention backend, such as native or flash")
    embedding_cache_mib: int = Field(default=1024, ge=0, description="bound on the cached prompt embeddings")
    options: dict[str, JsonValue] = Field(default={}, description="constructor arguments of a family other than auto")

    @field_validator("family")
    @classmethod
    def _known(cls, family: str) -> str:
        return _registered(BACKBONES, family)

    @field_validator("options")
    @classmethod
    def _for_others(cls, options: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if options and info.data.get("family") == AUTO:
            raise ValueError(f"{', '.join(options)} given, but family auto has its own keys (set backbone.<key>)")
        return options

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the backbone's constructor."""
        if self.family == AUTO:
            return self.model_dump(exclude={"family", "guidance_scale", "options"})
        named = {} if self.model == SHAPES else {"model": self.model}
        return {**named, **self.options}

    @property
    def portable(self) -> dict[str, Any]:
        """What of these a solver file keeps: nothing about the machine."""
        return {"max_sequence_length": self.max_sequence_length} if self.family == AUTO else self.arguments


class SolverConfig(Section):
    """The solver's shape: N intervals of K points."""

    intervals: int = Field(default=2, ge=1, le=1000, description="N")
    points: int = Field(default=3, ge=1, le=64, description="K, evaluated in one batch")
    start_point: bool = Field(default=True, description="the first of them is the interval's start; K = 1: Euler")
    afs: bool = Field(default=False, description="analytical first step: one evaluation less")
    order: int = Field(default=1, ge=1, le=4, description="of the multistep slope that leads to the points")


class PromptsConfig(Section):
    """Training prompts, and those held out."""

    train: str = Field(default=SHAPES, description="shapes, builtin, or a file: .txt, .csv, .parquet or .jsonl")
    num_train: Positive = Field(default=256, description="of shapes or builtin; a file gives all that it holds")
    validation: Positive = Field(default=48, description="prompts that choose the best table")
    test: Positive = Field(default=128, description="prompts that the result is reported on")
    two_things: float = Field(default=0.5, ge=0, le=1, description="share of shapes with two objects")

    @field_validator("train")
    @classmethod
    def _source(cls, train: str) -> str:
        if train not in (SHAPES, BUILTIN) and not train.lower().endswith(SUFFIXES):
            kinds = ", ".join(SUFFIXES)
            raise ValueError(f"is {train!r}, expected {SHAPES!r}, {BUILTIN!r} or the path of a file ({kinds})")
        return train


class RewardConfig(Section):
    """One head of the mix, and its actors."""

    head: str = Field(default="clip", description="a head's registry name, or module:Class")
    options: dict[str, JsonValue] = Field(default={}, description="the head's constructor arguments")
    backend: Literal["native", "package"] = Field(
        default="native", description="package: the published package, in its own environment (epd-ray rewards install)"
    )
    weight: Amount = Field(default=1.0, description="share in the mix, relative to the other heads; 0: only watched")
    replicas: int = Field(default=1, ge=0, description="number of actors at the start; 0: the driver scores")
    min_replicas: Positive | None = Field(default=None, description="while little waits; null: replicas")
    max_replicas: Positive | None = Field(default=None, description="while much waits; null: replicas")
    num_cpus: Amount = Field(default=0.25, description="per actor")
    num_gpus: Gpus = Field(default=0.0, description="per actor")
    resources: CustomResources = Field(default={}, description="custom Ray resources per actor")

    @field_validator("head")
    @classmethod
    def _known(cls, head: str) -> str:
        return _registered(HEADS, head)

    @field_validator("replicas")
    @classmethod
    def _in_its_environment(cls, replicas: int, info: ValidationInfo) -> int:
        if replicas == 0 and info.data.get("backend") == "package":
            raise ValueError("is 0, at least 1 is needed with backend package (its environment is another process's)")
        return replicas

    @field_validator("max_replicas")
    @classmethod
    def _in_order(cls, most: int | None, info: ValidationInfo) -> int | None:
        start = info.data.get("replicas", 1)
        least = info.data.get("min_replicas") or start
        if start == 0 and (least or most):
            raise ValueError(f"min_replicas {least or None} and max_replicas {most} need replicas of at least 1, not 0")
        if not least <= start <= (most or start):
            raise ValueError(f"min_replicas {least} <= replicas {start} <= max_replicas {most or start} does not hold")
        return most

    @field_validator("options")
    @classmethod
    def _without_secrets(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if _holds_secret(str(options.get("url", ""))):  # the run directory keeps its configuration
            raise ValueError("url holds a login or token: put a token into a variable and name it as token_env")
        return options


class DistillConfig(Section):
    """Stage 1: a table that follows a finer solver."""

    enabled: bool = Field(default=True, description="false: start from evenly spaced points of equal weight")
    table: str | None = Field(default=None, description="solver directory, preset or hub id to start from")
    method: Literal["least_squares", "gradient"] = Field(
        default="least_squares", description="gradient: goes on from there through the network"
    )
    prompts: Positive = Field(default=32, description="training prompts that are followed")
    grid: Positive = Field(default=11, description="positions tried per interval")
    teacher_steps: Positive = Field(default=6, description="the teacher's steps per interval")
    min_weight: float = Field(
        default=0.05, ge=0.001, lt=1, description="smallest weight of a point, so that it can be drawn"
    )
    steps: Positive = Field(default=32, description="of the gradient, per interval")
    batch: Positive = Field(default=16, description="prompts a step")
    lr: float = Field(default=0.1, gt=0, le=10, description="of Adam, falling to 0")
    scale_range: float = Field(
        default=0.7, ge=0, lt=1, description="direction scales, where rdpo.scale_dir has them, stay this close to 1"
    )


class RDPOSection(Section):
    """Stage 2: the policy and its update."""

    iterations: int = Field(default=45, ge=0, description="updates; 0 keeps the table of stage 1")
    prompts_per_iteration: Positive = Field(default=8, description="P")
    group_size: int = Field(default=4, description="G, images per prompt")
    same_latent: bool = Field(default=True, description="images of a group share their noise")
    baseline: Literal["per_prompt", "mixed"] = Field(default="per_prompt", description="mixed: the reference's")
    lr: float = Field(default=1e-3, gt=0, le=1, description="of AdamW, at the start")
    lr_schedule: Literal["constant", "linear", "cosine", "inverse"] = Field(
        default="constant",
        description="over the iterations: linear, cosine: to 0; inverse: as 1 / iteration after a tenth of them",
    )
    weight_decay: Amount = Field(default=0.01, description="of AdamW")
    clip: float = Field(default=0.2, gt=0, lt=1, description="epsilon of the clipped surrogate")
    epochs: Positive = Field(default=1, description="passes over an iteration's images")
    minibatch: Positive = Field(default=16, description="images per gradient step: a divisor of an iteration's, or all")
    grad_clip: float = Field(default=1.0, gt=0, description="bound on the gradient's norm")
    kl_coeff: Amount = Field(default=0.0, description="weight of the KL to the table of stage 1")
    entropy_coeff: Amount = Field(default=0.0, description="weight of the entropy")
    concentration: float = Field(default=30.0, gt=0, description="total Dirichlet concentration at the start")
    concentration_bound: float = Field(default=5.0, ge=1, description="its largest value, times the start")
    scale_dir: bool = Field(default=True, description="find and train direction scales too")
    scale_time: bool = Field(default=False, description="train time scales too; stage 1 finds them by gradient alone")
    hidden_width: Positive = Field(default=128, description="of the policy network")
    hidden_depth: Positive = Field(default=2, description="of the policy network")
    normalisation: Literal["none", "reference", "zscore"] = Field(
        default="none", description="of raw scores before the mix: reference: its clamps; zscore: over a running window"
    )
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
        if prompts and size and (problem := minibatch_problem(minibatch, prompts * size)):
            raise ValueError(problem)
        return minibatch

    @property
    def images_per_iteration(self) -> int:
        """Number of images that an iteration draws."""
        return self.prompts_per_iteration * self.group_size


class EvaluationConfig(Section):
    """What the learned solver is compared with."""

    every: Positive = Field(default=5, description="iterations between validations")
    patience: int = Field(default=0, ge=0, description="end after so many validations without progress; 0: never")
    stop_on_alarm: bool = Field(default=False, description="end when heads that are not trained on fall")
    baselines: tuple[Annotated[str, AfterValidator(_solver)], ...] = Field(
        default=("euler", "euler_no_zero", "heun", "dpm2", "ipndm", "dpmpp2m", "unipc"),
        strict=False,
        description="names in epd_ray/solvers/zoo.py, or module:function, also @schedule; at the same parallel NFE",
    )
    equal_evals: bool = Field(default=True, description="also at the same total evaluations")
    pictures: int = Field(default=8, ge=0, description="rows of the contact sheet")


class ClusterConfig(Section):
    """Where the actors run and what they ask for. The defaults fit two cores with one reward actor."""

    address: str | None = Field(default=None, description="of a Ray cluster; null: a local one on loopback")
    dashboard: bool = Field(default=False, description="of a local Ray: on loopback, its URL is shown")
    placement_timeout_s: float = Field(
        default=30.0, gt=0, description="for room to turn up; more where an autoscaler adds nodes, such as 1200"
    )
    task_timeout_s: float | None = Field(
        default=1800.0,
        gt=0,
        description="for an answer, before a rollout or reward actor is replaced; the first of a process, which loads "
        "the model, may take four times as long; null: no bound",
    )
    rollout_actors: int = Field(default=2, ge=0, description="0: in the driver")
    max_rollout_actors: int | None = Field(
        default=None, ge=1, description="as nodes join; null: rollout_actors, however many nodes there are"
    )
    rollout_cpus: Amount = Field(default=0.75, description="per actor")
    rollout_gpus: Gpus = Field(default=0.0, description="per actor")
    rollout_resources: CustomResources = Field(default={}, description="custom Ray resources per actor")
    images_per_job: Positive = Field(default=8, description="batch of one call, whatever the number of actors")
    encoder_actors: int = Field(default=0, ge=0, le=1, description="1: text encoders in an actor of their own")
    encoder_cpus: Amount = Field(default=0.25, description="of the encoder actor")
    encoder_gpus: Gpus = Field(default=0.0, description="of the encoder actor; 0: it runs on the CPU")
    encoder_resources: CustomResources = Field(default={}, description="custom Ray resources of the encoder actor")
    feature_gpus: Gpus = Field(default=0.0, description="of the actor whose features FID and diversity see; 0: CPU")
    learner_actors: int = Field(default=1, ge=0, le=1, description="0: in the driver")
    learner_cpus: Amount = Field(default=0.25, description="of the learner")
    learner_gpus: Gpus = Field(default=0.0, description="of the learner")
    env: tuple[str, ...] = Field(
        default=("HF_TOKEN", "HF_HOME"), strict=False, description="names of environment variables that actors get"
    )

    @field_validator("max_rollout_actors")
    @classmethod
    def _at_least_the_start(cls, most: int | None, info: ValidationInfo) -> int | None:
        start = info.data.get("rollout_actors", 0)
        if most is not None and (not start or most < start):
            raise ValueError(f"is {most}, with rollout_actors {start} at the start at least {max(start, 1)} of each")
        return most

    @field_validator("env", mode="before")
    @classmethod
    def _names_alone(cls, env: Any) -> Any:
        names = env if isinstance(env, list | tuple) else [None]
        wrong = [i for i, name in enumerate(names) if not _names_variable(name)]
        if wrong:  # it may hold a token, which must not be shown
            raise ValueError(
                f"entry {wrong[0]} is no name of a variable: list names alone, such as [HF_TOKEN] (their values stay "
                "in the environment, because a run keeps its configuration)"
            )
        return env


class CheckpointConfig(Section):
    """What a resumed run continues from."""

    every: Positive = Field(default=5, description="iterations between checkpoints, and uploads of a remote run")
    keep: Positive = Field(default=3, description="newest ones that stay on disk, besides the best one")


class StoreConfig(Section):
    """What the rollout files hold."""

    images: bool = Field(default=False, description="every picture too, as PNG")


def _keyless(section: Any, variable: str) -> Any:
    """A tracker's section as written; keys that hold secrets are refused without being shown."""
    secret = [key for key in section if SECRET.search(str(key))] if isinstance(section, dict) else []
    if secret:  # a run keeps its configuration
        raise ValueError(f"{secret[0]} is no setting: its value comes from the environment alone (set {variable})")
    return section


class WandbConfig(Section):
    """Weights & Biases; its key comes from WANDB_API_KEY or `wandb login`, WANDB_MODE=offline needs none."""

    project: str = Field(default="epd-ray", min_length=1, description="that the run belongs to")
    group: str | None = Field(default=None, description="of runs in the project")

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, section: Any) -> Any:
        return _keyless(section, "WANDB_API_KEY")


class MlflowConfig(Section):
    """MLflow; name and password come from MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN."""

    tracking_uri: str | None = Field(default=None, description="of the server; null: MLFLOW_TRACKING_URI")
    experiment: str = Field(default="epd-ray", min_length=1, description="that the run belongs to")

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, section: Any) -> Any:
        return _keyless(section, "MLFLOW_TRACKING_TOKEN")

    @field_validator("tracking_uri")
    @classmethod
    def _without_login(cls, uri: str | None) -> str | None:
        if uri is not None and _holds_secret(uri):
            raise ValueError(
                "holds a login or token: set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN instead"
            )
        return uri


class TrackingConfig(Section):
    """Where the metrics go beside metrics.jsonl, TensorBoard and Ray's own metrics; null: not there."""

    wandb: WandbConfig | None = Field(default=None, description="Weights & Biases; {}: with its defaults")
    mlflow: MlflowConfig | None = Field(default=None, description="MLflow; {}: with its defaults")
