"""The sections of a run's configuration: every key with its type, bounds, default and meaning.

The defaults are the run that `epd-ray train` makes on the embedded model. A key's `description` is what users read: it
says the unit, the bounds, and what null means.
"""

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from epd_ray.backbones import BACKBONES
from epd_ray.config.values import (
    Amount,
    CustomResources,
    Gpus,
    Positive,
    SolverName,
    holds_secret,
    names_variable,
    registered,
    without_secret_keys,
)
from epd_ray.policy.minibatches import minibatch_problem
from epd_ray.prompts.files import SUFFIXES
from epd_ray.prompts.splits import BUILTIN, SHAPES
from epd_ray.rewards import HEADS

AUTO = "auto"
RESERVED_HEADS = {
    *("mean", "group_std", "silent_groups", "solver", "prompt", "noise_seed", "scene_accuracy", "iteration", "reward"),
    *("low", "high", "gain", "gain_low", "gain_high", "best", "stalled"),
    *("sampler", "prompt_id", "image", "shard", "session", "seconds"),
    *("sharpness", "features", "diversity", "frechet_distance"),
}
"""Names that columns and metrics other than rewards have, and that no reward head may take."""


class Section(BaseModel):
    # strict: "8" and true are no integers. validate_default: the validators below also judge what was left out.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class BackboneConfig(Section):
    """The frozen diffusion model, and how it is opened."""

    family: str = Field(
        default="auto",
        description="The backbone family. auto takes it from the pipeline's model_index.json; otherwise give a "
        "registered name or module:Class.",
    )
    model: str = Field(
        default=SHAPES,
        description="The diffusion model: the directory of a diffusers pipeline, a Hugging Face hub id, or the name of "
        "an embedded model.",
    )
    revision: str | None = Field(
        default=None, description="The branch, tag or commit of a hub repository; null takes its default branch."
    )
    guidance_scale: Amount | None = Field(
        default=7.0,
        description="The weight of the prompt in classifier-free guidance, at least 0. Up to 1 there is no guidance; "
        "null takes the value that is usual for the family.",
    )
    resolution: int | None = Field(
        default=None,
        ge=8,
        multiple_of=8,
        description="The width and height of the pictures in pixels, a multiple of 8 and at least 8; null takes the "
        "model's own.",
    )
    device: str = Field(
        default="auto",
        description="The torch device that the model runs on, such as cuda or cpu. auto takes the first of cuda, mps "
        "and cpu that is there.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="The number type that the networks compute in. auto takes bfloat16 where the device has it, else "
        "float16 on a GPU and float32 on a CPU; unconditional models get float32.",
    )
    # Without T5 the pipeline pads with empty tokens, which the embedded transformer computes all the same: so 20 there.
    max_sequence_length: int | None = Field(
        default=20,
        ge=1,
        le=512,
        description="The number of T5 tokens of a prompt, at least 1 and at most 512, in families that have T5; null "
        "takes the pipeline's own number.",
    )
    offload: Literal["none", "model", "sequential"] = Field(
        default="none",
        description="How much of the model is on the device at a time: all of it (none), the network at work (model), "
        "or the layer at work (sequential, slowest). model and sequential need the accelerate package.",
    )
    vae_slicing: bool = Field(
        default=False, description="Whether the VAE decodes one picture at a time, which takes less memory."
    )
    vae_tiling: bool = Field(
        default=False, description="Whether the VAE decodes each picture in tiles, which takes less memory."
    )
    compile: bool = Field(default=False, description="Whether torch.compile compiles the denoising network.")
    attention: str | None = Field(
        default=None,
        description="The diffusers attention backend of the denoising network, such as native or flash; null leaves "
        "the choice to diffusers.",
    )
    embedding_cache_mib: int = Field(
        default=1024,
        ge=0,
        description="The memory in MiB that each process may use to keep the embeddings of prompts, at least 0.",
    )
    options: dict[str, JsonValue] = Field(
        default={}, description="The keyword arguments of the backbone's constructor, for a family other than auto."
    )

    @field_validator("family")
    @classmethod
    def _known(cls, family: str) -> str:
        return registered(BACKBONES, family)

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
        """The arguments that a solver file keeps, which are those that do not depend on the machine."""
        return {"max_sequence_length": self.max_sequence_length} if self.family == AUTO else self.arguments


class SolverConfig(Section):
    """The shape of the solver's table: N intervals with K points each."""

    intervals: int = Field(
        default=2,
        ge=1,
        le=1000,
        description="N, the number of intervals of the sigma schedule, at least 1 and at most 1000.",
    )
    points: int = Field(
        default=3,
        ge=1,
        le=64,
        description="K, the number of points in each interval, at least 1 and at most 64; they are evaluated in one "
        "batch.",
    )
    start_point: bool = Field(
        default=True,
        description="Whether the first point is the start of its interval, whose drift is known and costs no "
        "evaluation. With points: 1 the solver is then Euler's method with scaled steps.",
    )
    afs: bool = Field(
        default=False,
        description="Whether the analytical first step replaces the very first evaluation by a formula.",
    )
    order: int = Field(
        default=1,
        ge=1,
        le=4,
        description="The number of drifts that the slope towards the points is extrapolated from, at least 1 (the "
        "interval's own drift alone) and at most 4.",
    )


class PromptsConfig(Section):
    """The prompts for training, and those that are held out."""

    train: str = Field(
        default=SHAPES,
        description="The source of the prompts: shapes (captions for the embedded model), builtin (prompts that come "
        "with the package), or the path of a .txt, .csv, .parquet or .jsonl file.",
    )
    num_train: Positive = Field(
        default=256,
        description="The number of training prompts from shapes or builtin, at least 1. From a file, all prompts "
        "train that are not held out.",
    )
    validation: Positive = Field(
        default=48, description="The number of held-out prompts that choose the best table, at least 1."
    )
    test: Positive = Field(
        default=128, description="The number of held-out prompts that results are reported on, at least 1."
    )
    two_things: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="The share of shapes captions with two objects, at least 0 and at most 1; the others have one.",
    )

    @field_validator("train")
    @classmethod
    def _source(cls, train: str) -> str:
        if train not in (SHAPES, BUILTIN) and not train.lower().endswith(SUFFIXES):
            kinds = ", ".join(SUFFIXES)
            raise ValueError(f"is {train!r}, expected {SHAPES!r}, {BUILTIN!r} or the path of a file ({kinds})")
        return train


class RewardConfig(Section):
    """One reward head, and the actors that score with it."""

    head: str = Field(
        default="clip", description="The model that scores pictures: the registered name of a head, or module:Class."
    )
    options: dict[str, JsonValue] = Field(default={}, description="The keyword arguments of the head's constructor.")
    backend: Literal["native", "package"] = Field(
        default="native",
        description="The code that scores: native is this project's own; package is the published package, in the "
        "environment that epd-ray rewards install builds.",
    )
    weight: Amount = Field(
        default=1.0,
        description="The head's share in the reward, relative to the other heads, at least 0. With 0 the head is "
        "reported, but nothing is learned from it.",
    )
    replicas: int = Field(
        default=1,
        ge=0,
        description="The number of actors at the start, at least 0; with 0 the driver scores.",
    )
    min_replicas: Positive | None = Field(
        default=None,
        description="The number of actors that are kept while few pictures wait, at least 1; null means replicas.",
    )
    max_replicas: Positive | None = Field(
        default=None,
        description="The largest number of actors while many pictures wait, at least 1; null means replicas.",
    )
    num_cpus: Amount = Field(
        default=0.25, description="The CPU cores that each actor reserves, at least 0; fractions are possible."
    )
    num_gpus: Gpus = Field(
        default=0.0,
        description="The GPUs that each actor reserves, at least 0: a share of one GPU, or a whole number. With 0 the "
        "head runs on the CPU.",
    )
    resources: CustomResources = Field(
        default={},
        description="The custom Ray resources that each actor reserves, by name, at least 0 of each.",
    )

    @field_validator("head")
    @classmethod
    def _known(cls, head: str) -> str:
        return registered(HEADS, head)

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
        if holds_secret(str(options.get("url", ""))):  # the run directory keeps its configuration
            raise ValueError("url holds a login or token: put a token into a variable and name it as token_env")
        return options


class DistillConfig(Section):
    """Stage 1: fitting a table whose states follow those of a much finer solver, the teacher."""

    enabled: bool = Field(
        default=True,
        description="Whether stage 1 runs; without it training starts from evenly spaced points of equal weight.",
    )
    table: str | None = Field(
        default=None,
        description="The solver to start from in place of stage 1: a solver directory, the name of a preset, or a hub "
        "id; null fits a new table.",
    )
    method: Literal["least_squares", "gradient"] = Field(
        default="least_squares",
        description="How the table is fitted. gradient starts from the result of least_squares and improves it by "
        "back-propagation through the network.",
    )
    prompts: Positive = Field(
        default=32, description="The number of training prompts that the table is fitted on, at least 1."
    )
    grid: Positive = Field(
        default=11,
        description="The number of positions in each interval that least_squares chooses the points from, at least 1 "
        "and not fewer than solver.points.",
    )
    teacher_steps: Positive = Field(
        default=6, description="The number of DPM-Solver-2 steps of the teacher in each interval, at least 1."
    )
    min_weight: float = Field(
        default=0.05,
        ge=0.001,
        lt=1,
        description="The smallest weight that a point may get, at least 0.001 and below 1 / solver.points, so that "
        "the policy can draw around it.",
    )
    steps: Positive = Field(
        default=32, description="The number of gradient steps in each interval, at least 1; for method gradient."
    )
    batch: Positive = Field(
        default=16,
        description="The number of prompts in a gradient step, at least 1, rounded to whole jobs of "
        "cluster.images_per_job; for method gradient.",
    )
    lr: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description="The learning rate of Adam at the first step, above 0 and at most 10, which falls to 0 along a "
        "cosine; for method gradient.",
    )
    scale_range: float = Field(
        default=0.7,
        ge=0,
        lt=1,
        description="How far direction scales (and time scales, if trained) may be from 1, at least 0 and below 1; "
        "only with rdpo.scale_dir.",
    )


class RDPOSection(Section):
    """Stage 2: the reinforcement learning that improves the table, its policy and its update."""

    iterations: int = Field(
        default=45,
        ge=0,
        description="The number of iterations, at least 0; with 0 the table of stage 1 is the result.",
    )
    prompts_per_iteration: Positive = Field(
        default=8, description="P, the number of prompts in an iteration, at least 1."
    )
    group_size: int = Field(
        default=4,
        description="G, the number of pictures of each prompt, at least 2; each is compared with the others of its "
        "group.",
    )
    same_latent: bool = Field(
        default=True,
        description="Whether the pictures of a group start from the same noise, so that only tables differ.",
    )
    baseline: Literal["per_prompt", "mixed"] = Field(
        default="per_prompt",
        description="What a picture's reward is compared with: the other pictures of its prompt (per_prompt), or, as "
        "in the reference code, pictures of several prompts (mixed).",
    )
    lr: float = Field(
        default=1e-3,
        gt=0,
        le=1,
        description="The learning rate of AdamW at the first iteration, above 0 and at most 1.",
    )
    lr_schedule: Literal["constant", "linear", "cosine", "inverse"] = Field(
        default="constant",
        description="How the learning rate changes over the iterations. linear and cosine fall to 0; inverse falls as "
        "1 / iteration after the first tenth of them.",
    )
    weight_decay: Amount = Field(default=0.01, description="The weight decay of AdamW, at least 0.")
    clip: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="The clipping range epsilon of the PPO objective, above 0 and below 1.",
    )
    num_epochs: Positive = Field(
        default=1, description="The number of passes over the pictures of an iteration, at least 1."
    )
    minibatch_size: Positive = Field(
        default=16,
        description="The number of pictures in a gradient step, at least 1: a divisor of the pictures in an iteration, "
        "or all of them.",
    )
    grad_clip: float = Field(
        default=1.0, gt=0, description="The largest norm of the gradient, above 0; longer ones are scaled down to it."
    )
    kl_coeff: Amount = Field(
        default=0.0,
        description="The weight in the loss of the KL divergence between the policy and that of the start, at least 0.",
    )
    entropy_coeff: Amount = Field(
        default=0.0,
        description="The weight in the loss of the policy's entropy, at least 0. Larger values keep the draws varied.",
    )
    concentration: float = Field(
        default=30.0,
        gt=0,
        description="The total concentration of each Dirichlet distribution at the start, above 0. Larger values draw "
        "closer to the table of stage 1.",
    )
    concentration_bound: float = Field(
        default=5.0,
        ge=1,
        description="The largest total concentration, as a multiple of rdpo.concentration, at least 1.",
    )
    scale_dir: bool = Field(
        default=True, description="Whether direction scales are fitted in stage 1 and trained in stage 2."
    )
    scale_time: bool = Field(
        default=False,
        description="Whether time scales are trained in stage 2; stage 1 fits them with distill.method: gradient only.",
    )
    hidden_width: Positive = Field(
        default=128, description="The width of the policy network's hidden layers, at least 1."
    )
    hidden_depth: Positive = Field(
        default=2, description="The number of residual layers of the policy network, at least 1."
    )
    normalisation: Literal["none", "reference", "zscore"] = Field(
        default="none",
        description="How raw scores are changed before the heads are averaged: not at all (none), by the clamps of the "
        "reference code (reference), or to z-scores over the last 1024 pictures (zscore).",
    )
    staleness: int = Field(
        default=1,
        ge=0,
        description="The largest number of updates that a picture's policy may be old, at least 0; with 0 each step "
        "waits for the one before.",
    )

    @field_validator("group_size")
    @classmethod
    def _leaves_one_out(cls, size: int) -> int:
        if size < 2:
            raise ValueError(f"is {size}, at least 2 is needed (leave-one-out compares the images of a group)")
        return size

    @field_validator("minibatch_size")
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
    """How often the table is validated, when training ends early, and what the result is compared with."""

    every: Positive = Field(default=5, description="The number of iterations between validations, at least 1.")
    patience: int = Field(
        default=0,
        ge=0,
        description="The number of validations in a row without progress that end training, at least 0; with 0 "
        "training never ends early for this reason.",
    )
    stop_on_alarm: bool = Field(
        default=False,
        description="Whether training ends when a head that nothing is learned from falls while the reward rises.",
    )
    baselines: tuple[SolverName, ...] = Field(
        default=("euler", "euler_no_zero", "heun", "dpm2", "ipndm", "dpmpp2m", "unipc"),
        strict=False,
        description="The solvers to compare with at the same parallel NFE (the longest chain of evaluations that wait "
        "for each other): names from epd_ray/solvers/zoo.py or module:function, also with @schedule.",
    )
    equal_evals: bool = Field(
        default=True, description="Whether to compare at the same total number of evaluations too."
    )
    pictures: int = Field(
        default=8, ge=0, description="The number of prompts whose pictures are kept for the report, at least 0."
    )


class ClusterConfig(Section):
    """Where the actors run, and what they reserve. The defaults fit two CPU cores with one reward actor."""

    address: str | None = Field(
        default=None,
        description="The address of a Ray cluster, or auto for the one that runs here; null starts a local Ray.",
    )
    dashboard: bool = Field(
        default=False, description="Whether a local Ray starts its dashboard; its address is shown, on loopback only."
    )
    placement_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="The seconds to wait until the cluster has room for the actors, above 0. Give more, such as 1200, "
        "where an autoscaler adds nodes.",
    )
    task_timeout_s: float | None = Field(
        default=1800.0,
        gt=0,
        description="The seconds, above 0, without an answer after which a rollout or reward actor is replaced; the "
        "first answer of a process, which loads the model, may take four times as long. null never replaces one.",
    )
    rollout_actors: int = Field(
        default=2, ge=0, description="The number of actors that draw, at least 0; with 0 the driver draws."
    )
    max_rollout_actors: int | None = Field(
        default=None,
        ge=1,
        description="The largest number of rollout actors as nodes join, at least 1; null keeps rollout_actors.",
    )
    rollout_cpus: Amount = Field(
        default=0.75, description="The CPU cores that each rollout actor reserves, at least 0; fractions are possible."
    )
    rollout_gpus: Gpus = Field(
        default=0.0,
        description="The GPUs that each rollout actor reserves, at least 0: a share of one GPU, or a whole number. "
        "With 0 it draws on the CPU.",
    )
    rollout_resources: CustomResources = Field(
        default={},
        description="The custom Ray resources that each rollout actor reserves, by name, at least 0 of each.",
    )
    images_per_job: Positive = Field(
        default=8,
        description="The number of pictures that are drawn in one batch, at least 1, whatever the number of actors.",
    )
    encoder_actors: int = Field(
        default=0,
        ge=0,
        le=1,
        description="The number of actors for the text encoders, at least 0 and at most 1; with 0 each rollout actor "
        "has text encoders of its own.",
    )
    encoder_cpus: Amount = Field(
        default=0.25, description="The CPU cores that the encoder actor reserves, at least 0; fractions are possible."
    )
    encoder_gpus: Gpus = Field(
        default=0.0,
        description="The GPUs that the encoder actor reserves, at least 0: a share of one GPU, or a whole number. With "
        "0 it runs on the CPU.",
    )
    encoder_resources: CustomResources = Field(
        default={},
        description="The custom Ray resources that the encoder actor reserves, by name, at least 0 of each.",
    )
    feature_gpus: Gpus = Field(
        default=0.0,
        description="The GPUs, at least 0, that an actor reserves whose features a suite's Frechet distance and "
        "diversity compare: a share of one GPU, or a whole number. With 0 it runs on the CPU.",
    )
    learner_actors: int = Field(
        default=1,
        ge=0,
        le=1,
        description="The number of actors for the learner, at least 0 and at most 1; with 0 the driver learns.",
    )
    learner_cpus: Amount = Field(
        default=0.25, description="The CPU cores that the learner reserves, at least 0; fractions are possible."
    )
    learner_gpus: Gpus = Field(
        default=0.0,
        description="The GPUs that the learner reserves, at least 0: a share of one GPU, or a whole number.",
    )
    env: tuple[str, ...] = Field(
        default=("HF_TOKEN", "HF_HOME"),
        strict=False,
        description="The names of the environment variables that are handed to the actors; their values are not kept.",
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
        wrong = [i for i, name in enumerate(names) if not names_variable(name)]
        if wrong:  # it may hold a token, which must not be shown
            raise ValueError(
                f"entry {wrong[0]} is no name of a variable: list names alone, such as [HF_TOKEN] (their values stay "
                "in the environment, because a run keeps its configuration)"
            )
        return env


class CheckpointConfig(Section):
    """The checkpoints that an interrupted run continues from."""

    every: Positive = Field(
        default=5,
        description="The number of iterations between checkpoints, at least 1; a run at a URI is uploaded as often.",
    )
    keep: Positive = Field(
        default=3, description="The number of newest checkpoints that are kept besides the best one, at least 1."
    )


class StoreConfig(Section):
    """What the rollout files hold."""

    images: bool = Field(default=False, description="Whether the rollout files hold each picture too, as PNG.")


class WandbConfig(Section):
    """Weights & Biases. Its key comes from WANDB_API_KEY or `wandb login`; WANDB_MODE=offline needs none."""

    project: str = Field(default="epd-ray", min_length=1, description="The project that the run belongs to.")
    group: str | None = Field(
        default=None, description="The group of runs in the project that the run belongs to; null means no group."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, section: Any) -> Any:
        return without_secret_keys(section, "WANDB_API_KEY")


class MlflowConfig(Section):
    """MLflow. A login comes from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""

    tracking_uri: str | None = Field(
        default=None, description="The address of the tracking server; null takes it from MLFLOW_TRACKING_URI."
    )
    experiment: str = Field(default="epd-ray", min_length=1, description="The experiment that the run belongs to.")

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, section: Any) -> Any:
        return without_secret_keys(section, "MLFLOW_TRACKING_TOKEN")

    @field_validator("tracking_uri")
    @classmethod
    def _without_login(cls, uri: str | None) -> str | None:
        if uri is not None and holds_secret(uri):
            raise ValueError(
                "holds a login or token: set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN instead"
            )
        return uri


class TrackingConfig(Section):
    """Services that get the metrics besides metrics.jsonl, TensorBoard and Ray's own metrics."""

    wandb: WandbConfig | None = Field(
        default=None, description="The settings of Weights & Biases; {} takes their defaults, null sends nothing there."
    )
    mlflow: MlflowConfig | None = Field(
        default=None, description="The settings of MLflow; {} takes their defaults, null sends nothing there."
    )
