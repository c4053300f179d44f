"""The sections about who computes and what is kept: reward heads, actors, checkpoints, stored rollouts, trackers."""

from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from epd_ray.config.values import (
    Amount,
    CustomResources,
    Gpus,
    Positive,
    Section,
    holds_secret,
    names_variable,
    registered,
    without_secret_keys,
)
from epd_ray.rewards import HEADS

RESERVED_HEADS = {
    *("mean", "group_std", "silent_groups", "solver", "prompt", "noise_seed", "scene_accuracy", "iteration", "reward"),
    *("low", "high", "gain", "gain_low", "gain_high", "best", "stalled"),
    *("sampler", "prompt_id", "image", "shard", "session", "seconds"),
    *("sharpness", "features", "diversity", "frechet_distance"),
}
"""Names that columns and metrics other than rewards have, and that no reward head may take."""


class RewardConfig(Section):
    """One reward head, and the actors that score with it."""

    head: str = Field(
        default="clip",
        description="The model that scores pictures: the registered name of a head, or module:Class. Where it is left "
        "out, it is the head that <name> names.",
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
        description="The seconds, above 0, without an answer after which an actor is replaced; the first answer of a "
        "process, which loads the model, may take four times as long. null never replaces one.",
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

    py_modules: list[str] = Field(
        default=[],
        description="The paths of your own modules (.py files) and packages (folders) that hold heads or backbones; "
        "they are copied to the nodes of a cluster.",
    )

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
