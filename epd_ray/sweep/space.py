"""The `sweep` section of a YAML file: which values it tries, checked against the run that it varies."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, ValidationInfo, field_validator, model_validator

from epd_ray.config.loading import apply_override, read_yaml, resolve
from epd_ray.config.problems import problems_of
from epd_ray.config.run_config import RunConfig
from epd_ray.config.values import Positive, Section
from epd_ray.errors import ConfigError, shown
from epd_ray.randomness import Purpose, stream

COMBINATIONS = 1000  # of values, at most, that are checked before anything starts
CONCURRENT = 2  # trials at a time, unless the section says otherwise
LISTED = 64  # a range with fewer whole numbers is checked as a whole, because a minibatch may divide one batch only
MUTABLE = frozenset(
    f"rdpo.{name}" for name in ("lr", "weight_decay", "clip", "grad_clip", "kl_coeff", "entropy_coeff", "num_epochs")
)
"""Keys that PBT may change in a policy that has begun to train."""
# A trial's budget is a number of images, a start table has one shape, and z-scores are relative to a trial's own start.
FIXED = {"rdpo.iterations", "rdpo.normalisation", "distill.table"}
KEYS = frozenset(
    f"{section}.{name}"
    for section in ("rdpo", "solver", "distill")
    for name in RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
) - FIXED | {"backbone.guidance_scale"}
"""Keys that may be swept. With any other key the held-out rewards of two trials could not be compared."""

Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
Whole = Annotated[list[int], Field(min_length=2, max_length=2)]


class Distribution(Section):
    """The distribution of a key's values. Exactly one of the keys is given."""

    choice: Annotated[list[JsonValue], Field(min_length=1)] | None = Field(
        default=None, description="a list, of which each value is as likely"
    )
    uniform: Bounds | None = Field(default=None, description="[low, high], a number between them")
    loguniform: Bounds | None = Field(default=None, description="[low, high], a number whose logarithm is uniform")
    integers: Whole | None = Field(default=None, description="[low, high], a whole number from low to high")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"choice": given} if isinstance(given, list) else given

    @model_validator(mode="after")
    def _one(self) -> "Distribution":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} given, expected one of {', '.join(self.kinds())}")
        low, high = self.uniform or self.loguniform or self.integers or (0, 1)
        if low >= high:
            raise ValueError(f"{given[0]} is [{low:g}, {high:g}], expected the lower end first")
        if given[0] == "loguniform" and low <= 0:
            raise ValueError(f"loguniform is from {low:g}, expected more than 0")
        return self

    @classmethod
    def kinds(cls) -> list[str]:
        return list(cls.model_fields)

    @property
    def ends(self) -> list[JsonValue]:
        """Every value of a list or of a short range of whole numbers, and the two ends of any other range."""
        if self.integers is not None and self.integers[1] - self.integers[0] < LISTED:
            return list(range(self.integers[0], self.integers[1] + 1))
        for values in (self.choice, self.uniform, self.loguniform, self.integers):
            if values is not None:
                return list(values)
        return [0, 0]


class SweepSection(Section):
    """Which values are tried, in how many trials, and which trials may go on."""

    space: dict[str, Distribution] = Field(default={}, description="key of the run -> distribution of its values")
    trials: Positive = Field(default=8, description="number of runs, each with values drawn from the space")
    scheduler: Literal["asha", "pbt", "none"] = Field(
        default="asha",
        description="asha: the worse trials stop early; pbt: they go on from the policies of the better ones",
    )
    concurrent: Positive | None = Field(
        default=None, description=f"trials at a time, if there is room; null: {CONCURRENT}, with pbt all"
    )
    images: Positive | None = Field(
        default=None, description="training images of a trial; null: as many as the run draws"
    )
    grace: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="share of the images before asha may stop a trial, and between exchanges of pbt",
    )
    reduction: float = Field(default=3.0, gt=1, description="asha: one in this many trials goes on")

    @field_validator("space")
    @classmethod
    def _known(cls, space: dict[str, Distribution]) -> dict[str, Distribution]:
        if not space:
            raise ValueError("is empty: name what to vary, such as {rdpo.lr: {loguniform: [1e-4, 1e-2]}}")
        if unknown := [key for key in space if key not in KEYS]:
            if unknown[0] in FIXED:
                raise ValueError(f"{unknown[0]} is the same for all trials (their budget is sweep.images)")
            near = difflib.get_close_matches(unknown[0], KEYS, n=1)
            fix = f"did you mean {shown(near[0])}?" if near else "keys of rdpo, solver and distill can"
            raise ValueError(f"{unknown[0]} cannot be swept; {fix}")
        return space

    @field_validator("scheduler")
    @classmethod
    def _mutable(cls, scheduler: str, info: ValidationInfo) -> str:
        space = info.data.get("space")
        if scheduler == "pbt" and space and not MUTABLE & set(space):
            raise ValueError(
                f"pbt changes trials as they run, and {', '.join(space)} cannot be changed then: add one of "
                f"{', '.join(sorted(MUTABLE))}, or take asha"
            )
        return scheduler

    @field_validator("concurrent")
    @classmethod
    def _population(cls, concurrent: int | None, info: ValidationInfo) -> int | None:
        trials = info.data.get("trials", 1)
        if info.data.get("scheduler") == "pbt" and concurrent is not None and concurrent < trials:
            raise ValueError(f"is {concurrent}, but pbt's {trials} trials live together (they take turns): set null")
        return concurrent


class _File(Section):
    sweep: SweepSection


@dataclass(frozen=True)
class Plan:
    """A run, and the section that says how it is varied.

    Attributes:
        config: configuration of the run; its seed decides the held-out prompts and noise of all trials.
        sweep: the section.
    """

    config: RunConfig = field(repr=False)
    sweep: SweepSection

    @property
    def images(self) -> int:
        """Number of training images of a trial."""
        rdpo = self.config.rdpo
        return self.sweep.images or rdpo.iterations * rdpo.images_per_iteration

    def trial(self, values: Mapping[str, JsonValue]) -> RunConfig:
        """The run with these values, and with as many iterations as the budget allows, but at least 1.

        Args:
            values: key -> value.

        Raises:
            ConfigError: the values do not fit each other.
        """
        if problems := self._problems_with(values):
            raise ConfigError([f"{problem} (with {_listed(values)})" for problem in problems])
        varied = RunConfig.model_validate(self._with(values))
        rdpo = varied.rdpo
        iterations = max(1, self.images // rdpo.images_per_iteration)
        return varied.model_copy(update={"rdpo": rdpo.model_copy(update={"iterations": iterations})})

    def _with(self, values: Mapping[str, JsonValue]) -> dict[str, Any]:
        data = self.config.model_dump(mode="json")
        for key, value in values.items():
            section, name = key.split(".")
            data[section][name] = value
        return data

    def problems(self) -> list[str]:
        """Reasons why the sweep cannot be run, such as values of the space that do not fit each other."""
        if self.images < 1:
            return ["sweep.images: the run has no iterations: set it"]
        if self.config.rdpo.normalisation == "zscore":
            return ["rdpo.normalisation: z-scores of two trials cannot be compared: take none or reference"]
        found: dict[str, dict[str, JsonValue]] = {}
        for values in self._corners():
            for problem in self._problems_with(values):
                found.setdefault(problem, values)
        return [f"sweep.space: {problem} (with {_listed(values)})" for problem, values in found.items()]

    def _problems_with(self, values: Mapping[str, JsonValue]) -> list[str]:
        try:
            RunConfig.model_validate(self._with(values))
        except ValidationError as error:
            return problems_of(error)
        return []

    def _corners(self) -> Iterator[dict[str, JsonValue]]:
        """Every combination of the ends of all keys, or random ones where there are more than COMBINATIONS."""
        keys, ends = list(self.sweep.space), [values.ends for values in self.sweep.space.values()]
        rng = stream(Purpose.SWEEP_CHECK, 0)
        every = math.prod(map(len, ends)) <= COMBINATIONS
        drawn = product(*ends) if every else ([e[int(rng.integers(len(e)))] for e in ends] for _ in range(COMBINATIONS))
        return (dict(zip(keys, values, strict=True)) for values in drawn)


def _listed(values: Mapping[str, JsonValue]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def load_plan(path: Path | None, overrides: Sequence[str] = ()) -> Plan:
    """Read a run's configuration with a `sweep` section.

    Args:
        path: a YAML file as for `load_config`, with a `sweep` section; None means the defaults.
        overrides: changes of both, such as "sweep.trials=4" and "rdpo.iterations=20".

    Raises:
        ConfigError: the configuration is wrong; it lists every problem in a line of its own.
    """
    given: dict[str, Any] = {} if path is None else dict(read_yaml(path))
    section: dict[str, Any] = {"sweep": given.pop("sweep", None) or {}}
    own = [override for override in overrides if override.startswith("sweep.")]
    problems = [problem for override in own if (problem := apply_override(section, override))]
    plan = None
    try:
        config = resolve(given, [override for override in overrides if override not in own])
    except ConfigError as error:
        problems += error.problems
    try:
        sweep = _File.model_validate(section).sweep
    except ValidationError as error:
        problems += problems_of(error, _File)
    if not problems:
        plan = Plan(config, sweep)
        problems = plan.problems()
    if problems or plan is None:
        raise ConfigError(problems)
    return plan
