"""The sections about what a run draws and learns: every key with its type, bounds, default and meaning.

The defaults are the run that `epd-ray train` makes on the embedded model. A key's `description` is what users read: it
says the unit, the bounds, and what null means.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)

from epd_ray.backbones import BACKBONES
from epd_ray.config.values import (
    Amount,
    Positive,
    Section,
    SolverName,
    registered,
)
from epd_ray.errors import shown
from epd_ray.policy.minibatches import minibatch_problem
from epd_ray.prompts.files import SUFFIXES
from epd_ray.prompts.splits import BUILTIN, SHAPES
from epd_ray.solvers.costs import MAX_HISTORY

AUTO = "auto"
PIPELINE = "pipeline"
OPENED = (AUTO, PIPELINE)  # families that open a diffusers pipeline, with the keys of the section as options


class BackboneConfig(Section):
    """The frozen diffusion model, and how it is opened."""

    family: str = Field(
        default="auto",
        description="The backbone family. auto takes it from the pipeline's model_index.json; pipeline drives any "
        "pipeline through its own call; otherwise give a registered name or module:Class.",
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
        default={},
        description="The keyword arguments of the backbone's constructor, for a family other than auto. For family "
        "pipeline they are further arguments of the pipeline's call, such as negative_prompt, height and width.",
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
        if self.family in OPENED:
            common = self.model_dump(exclude={"family", "guidance_scale", "options"})
            return common if self.family == AUTO else {**common, "call": self.options}
        named = {} if self.model == SHAPES else {"model": self.model}
        return {**named, **self.options}

    @property
    def portable(self) -> dict[str, Any]:
        """The arguments that a solver file keeps, which are those that do not depend on the machine."""
        if self.family not in OPENED:
            return self.arguments
        cut = {"max_sequence_length": self.max_sequence_length}
        return cut if self.family == AUTO else {**cut, "call": self.options}


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
    grid: bool = Field(
        default=False,
        description="Whether the noise levels between the intervals are learned too, between the ends of the schedule.",
    )
    history: int = Field(
        default=0,
        ge=0,
        le=MAX_HISTORY,
        description="The number of earlier intervals whose drifts an interval weighs with learned weights, at least 0, "
        "at most 3 and below solver.intervals.",
    )
    guidance: bool = Field(
        default=False,
        description="Whether each interval's guidance scale is learned, starting at backbone.guidance_scale.",
    )
    reuse: int | Annotated[tuple[int, ...], Field(strict=False)] = Field(
        default=(),
        description="The intervals that leave out the network's pass without the prompt and take the difference that "
        "the prompt makes from an interval before them: their number, at least 0 and below solver.intervals, which "
        "stage 1 chooses, or a list of them, counted from 1, each from 2 to solver.intervals.",
    )

    @field_validator("history", "reuse")
    @classmethod
    def _within(cls, value: int | tuple[int, ...], info: ValidationInfo) -> int | tuple[int, ...]:
        count = info.data.get("intervals", 0)
        if isinstance(value, int):
            if value < 0 or value >= count > 0:
                raise ValueError(f"is {value}, at least 0 and below solver.intervals={count} is needed")
        elif wrong := [i for i in value if not 2 <= i <= count]:
            raise ValueError(f"has {wrong[0]}, from 2 to solver.intervals={count} is possible")
        return value

    @property
    def reused(self) -> tuple[bool, ...]:
        """[N], whether an interval reuses; empty where none does, or where stage 1 chooses them."""
        return tuple(i + 1 in self.listed for i in range(self.intervals)) if self.listed else ()

    @property
    def listed(self) -> tuple[int, ...]:
        """The intervals that reuse, counted from 1; empty where none does, or where stage 1 chooses them."""
        return () if isinstance(self.reuse, int) else self.reuse

    @property
    def reuse_count(self) -> int:
        """How many intervals that reuse stage 1 chooses."""
        return self.reuse if isinstance(self.reuse, int) else 0


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
    heads: str | None = Field(
        default=None,
        min_length=1,
        description="The column of the prompt file that names the reward heads which judge a row, maybe with weights, "
        "such as clip, ocr:2; null lets every head judge every row.",
    )

    @field_validator("train")
    @classmethod
    def _source(cls, train: str) -> str:
        if train not in (SHAPES, BUILTIN) and not train.lower().endswith(SUFFIXES):
            kinds = ", ".join(SUFFIXES)
            raise ValueError(f"is {shown(train)}, expected {SHAPES!r}, {BUILTIN!r} or the path of a file ({kinds})")
        return train

    @field_validator("heads")
    @classmethod
    def _of_a_table(cls, heads: str | None, info: ValidationInfo) -> str | None:
        train = str(info.data.get("train", SHAPES))
        if heads is not None and train.lower().endswith(".txt"):
            raise ValueError(f"is {shown(heads)}, but {shown(train)} has no columns: give a table of prompts, or null")
        return heads


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
        default=("euler_no_zero", "dpmpp2m"),
        strict=False,
        description="The solvers to compare with at the same parallel NFE (the longest chain of evaluations that wait "
        "for each other): names from epd_ray/solvers/zoo.py or module:function, also with @schedule and "
        "?guidance_scale=2&solver_order=3.",
    )
    equal_evals: bool = Field(
        default=True,
        description="Whether to compare at the same total number of evaluations too, which at one guidance scale means "
        "equally many passes of the network.",
    )
    tune: bool = Field(
        default=True,
        description="Whether the guidance, schedule and options of every rival are chosen on the validation prompts by "
        "the reward. The rivals as they come stand beside those that were tuned.",
    )
    tune_images: int = Field(
        default=128,
        ge=24,
        description="The number of pictures that are drawn at most to tune a rival, at least 24, the same for each; "
        "the many steps of the reference get half of them, for their guidance alone.",
    )
    pictures: int = Field(
        default=8, ge=0, description="The number of prompts whose pictures are kept for the report, at least 0."
    )
