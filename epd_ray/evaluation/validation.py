"""The held-out curve of a run: the scores of every prompt at each validation, and what was gained and lost since.

Each validation draws the same prompts from the same seeds, so that two validations are compared prompt by prompt. Most
of the uncertainty of a mean score comes from the choice of prompts, and the difference of two scores is free of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from epd_ray.errors import RunDirectoryError, shown
from epd_ray.evaluation.statistics import Interval, bootstrap_mean, judged, paired_difference
from epd_ray.solvers import SolverTable
from epd_ray.solvers.table import PARTS
from epd_ray.storage.documents import parse_json
from epd_ray.storage.parquet import read_table, write_table
from epd_ray.types import FloatArray

SCHEMA_VERSION = 1
ROWS = pa.schema([("iteration", pa.int32()), ("prompt", pa.string()), ("noise_seed", pa.int64())])
"""The columns of a file of validations beside its floats, which are the reward and a column for each head."""
FIX = "move it away: a resumed run writes it again"
ALARM_CONFIDENCE = 0.99  # higher than 95 %, because many heads are tested at many validations
STOPPED = {
    "patience": "the held-out reward has stopped getting better",
    "alarm": "a head that is not trained on fell while the reward rose",
}
"""Why fine-tuning ended before its last iteration, in words for people."""


@dataclass(frozen=True)
class Validation:
    """The scores of one table on the validation prompts.

    Attributes:
        iteration: the number of updates before this validation; 0 is the table at the start.
        reward: [B], the reward that is learned from.
        scores: reward head -> raw scores [B], NaN where it does not judge a prompt; "scene_accuracy" too if the prompts
            describe scenes.
    """

    iteration: int
    reward: FloatArray
    scores: Mapping[str, FloatArray]


@dataclass(frozen=True)
class Fall:
    """A head whose score fell while the reward rose.

    Attributes:
        head: the head's name.
        drop: the paired difference of its score to the start; the whole 99 % interval is below 0.
    """

    head: str
    drop: Interval

    def __str__(self) -> str:
        low_high = f"[{self.drop.low:+.4f}, {self.drop.high:+.4f}]"
        return f"{self.head} {self.drop.mean:+.4f} {low_high}"


@dataclass(frozen=True)
class Curve:
    """The validations of a run so far.

    Attributes:
        prompts: B prompts.
        seeds: B noise seeds, one for each prompt.
        trained: the names of the heads that are learned from; all other heads are watched.
        validations: the validations in order of iteration; the first is that of the start.
        progress: the index of the last validation that made progress: the whole 95 % interval of its paired difference
            to the previous one that made progress is above 0.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    trained: tuple[str, ...]
    validations: tuple[Validation, ...] = ()
    progress: int = 0

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of all scores."""
        return tuple(self.validations[0].scores) if self.validations else ()

    @property
    def watched(self) -> tuple[str, ...]:
        """The names of the scores that nothing is learned from."""
        return tuple(head for head in self.heads if head not in self.trained)

    @property
    def stalled(self) -> int:
        """The number of validations since the last progress."""
        return max(0, len(self.validations) - 1 - self.progress)

    def extended(self, found: Validation) -> "Curve":
        """This curve with one more validation."""
        validations = (*self.validations, found)
        if len(validations) == 1:
            return replace(self, validations=validations)
        gain = paired_difference(found.reward, validations[self.progress].reward)
        return replace(self, validations=validations, progress=len(self.validations) if gain.low > 0 else self.progress)

    def gain(self, index: int = -1) -> Interval:
        """The paired difference of a validation's reward to the reward at the start."""
        return paired_difference(self.validations[index].reward, self.validations[0].reward)

    def head_gain(self, head: str, index: int = -1, confidence: float = 0.95) -> Interval:
        """The paired difference of a head's raw scores at a validation to those at the start."""
        now, start = (self.validations[i].scores[head] for i in (index, 0))
        return paired_difference(now, start, confidence=confidence)

    def falls(self, index: int = -1) -> list[Fall]:
        """Find reward hacking: watched heads significantly below the start while the reward is significantly above it.

        A head's interval is one of 99 %, so a head that does not change counts as fallen at 1 of 200 validations.
        """
        if not self.validations or self.gain(index).low <= 0:
            return []
        found = [Fall(head, self.head_gain(head, index, ALARM_CONFIDENCE)) for head in self.watched]
        return [fall for fall in found if fall.drop.high < 0]

    def onset(self, index: int = -1) -> list[Fall]:
        """The falls of a validation that the validation before did not have."""
        index %= len(self.validations)
        before = {fall.head for fall in self.falls(index - 1)} if index else set()
        return [fall for fall in self.falls(index) if fall.head not in before]

    def alarm(self, index: int = -1) -> str | None:
        """A line for people if a head begins to fall at this validation; else None."""
        if not (begun := self.onset(index)):
            return None
        where = f"at iteration {self.validations[index].iteration} the held-out reward is up by"
        fell = "; ".join(map(str, begun))
        return f"reward hacking? {where} {self.gain(index).mean:+.4f}, but heads that are not trained on fell: {fell}"

    def metrics(self) -> dict[str, float]:
        """The last validation's entries in a row of metrics.jsonl."""
        last = self.validations[-1]
        reward, gain = bootstrap_mean(last.reward), self.gain()
        alarm = {"alarm/reward_hacking": float(bool(self.falls()))} if self.watched else {}
        return {
            **{f"validation/{head}": float(judged(values).mean()) for head, values in last.scores.items()},
            "validation/reward": reward.mean,
            "validation/low": reward.low,
            "validation/high": reward.high,
            "validation/gain": gain.mean,
            "validation/gain_low": gain.low,
            "validation/gain_high": gain.high,
            "validation/stalled": float(self.stalled),
            **alarm,
        }

    def state(self) -> dict[str, Any]:
        """The state as numbers and arrays, from which `restored` goes on exactly."""
        rows = [{"iteration": v.iteration, "reward": v.reward, "scores": dict(v.scores)} for v in self.validations]
        return {"progress": self.progress, "validations": rows}

    def restored(self, state: Mapping[str, Any]) -> "Curve":
        """The curve on the same prompts, as it was when `state` was called."""
        return replace(
            self, validations=tuple(Validation(**v) for v in state["validations"]), progress=state["progress"]
        )

    def table(self) -> pa.Table:
        """A table with one row for each validation and prompt."""
        count, times = len(self.prompts), len(self.validations)
        columns = {
            "iteration": pa.array(np.repeat([v.iteration for v in self.validations], count), pa.int32()),
            "prompt": pa.array(self.prompts * times, pa.string()),
            "noise_seed": pa.array(self.seeds * times, pa.int64()),
            "reward": np.concatenate([v.reward for v in self.validations]),
            **{head: _nullable([v.scores[head] for v in self.validations]) for head in self.heads},
        }
        about = {"schema_version": str(SCHEMA_VERSION), "trained": json.dumps(self.trained)}
        return pa.table(columns).replace_schema_metadata(about)


def _nullable(parts: Sequence[FloatArray]) -> pa.Array:
    """Scores one part after another; null where a head does not judge a prompt."""
    return pa.array(np.concatenate(parts), from_pandas=True)


@dataclass
class Best:
    """The best table so far by held-out reward.

    Attributes:
        reward: the mean held-out reward; -inf before the first validation.
        iteration: the number of updates before the table; -1 before the first validation.
        positions, weights, scale_dir, scale_time: the table's columns as numpy arrays; None if it lacks one.
    """

    reward: float = -np.inf
    iteration: int = -1
    columns: dict[str, Any] = field(default_factory=dict)  # of the table, as arrays [N, K]; empty before the first

    @property
    def found(self) -> bool:
        """Whether there is a table yet."""
        return bool(self.columns)

    @property
    def table(self) -> SolverTable:
        """The table."""
        return SolverTable(**{name: torch.as_tensor(np.array(values)) for name, values in self.columns.items()})

    @property
    def about(self) -> dict[str, Any]:
        """What the saved solver says about its origin."""
        stage = "rdpo" if self.iteration else "distilled"
        return {"stage": stage, "iteration": self.iteration, "validation_reward": round(self.reward, 6)}

    def take(self, table: SolverTable, reward: float, iteration: int) -> bool:
        """Keep a table if its reward is higher than the best so far; return whether it is."""
        if reward <= self.reward:
            return False
        self.reward, self.iteration = reward, iteration
        self.columns = {name: values.numpy() for name, values in table.tensors().items()}
        return True

    def state(self) -> dict[str, Any]:
        """Numbers and arrays for a checkpoint; None for each column that the table does not have."""
        absent = dict.fromkeys(PARTS)
        return {"reward": self.reward, "iteration": self.iteration, **absent, **self.columns}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Best":
        """The best table as it was at `state`."""
        columns = {name: state[name] for name in PARTS if state.get(name) is not None}
        return cls(state["reward"], state["iteration"], columns)


def write_curve(path: Path, curve: Curve) -> None:
    """Write the scores of every prompt as Parquet, whole or not at all.

    Raises:
        RunDirectoryError: the disk refuses.
    """
    write_table(path, curve.table())


def read_curve(path: Path) -> Curve | None:
    """Read what `write_curve` wrote; None if there is no such file.

    Raises:
        RunDirectoryError: the file cannot be read.
    """
    if not path.is_file():
        return None
    table = read_table(path, FIX, expected=ROWS)
    trained = parse_json(
        (table.schema.metadata or {}).get(b"trained", b""), f"trained in {path}", RunDirectoryError, FIX
    )
    if not isinstance(trained, list) or not all(isinstance(head, str) for head in trained):
        raise RunDirectoryError(f"trained in {path} is {shown(trained)}, expected a list of heads ({FIX})")
    heads = [name for name in table.column_names if name not in (*ROWS.names, "reward")]
    floats = ("reward", *heads)
    wrong = [name for name in floats if name not in table.column_names or not pa.types.is_floating(table[name].type)]
    for name in table.column_names:  # a head has nulls where it does not judge a prompt
        least = len(table) if name in heads else 1
        wrong += [name] if table[name].null_count >= least > 0 else []
    if wrong or not len(table):
        problem = f"column {shown(wrong[0])} is not as expected" if wrong else "it has no rows"
        raise RunDirectoryError(f"{path} cannot be read: {problem} ({FIX})")
    arrays = {name: np.asarray(table[name], np.float32) for name in floats}
    iterations, prompts, seeds = (np.asarray(table[name]) for name in ROWS.names)
    first = iterations == iterations[0]
    if any((iterations == iteration).sum() != first.sum() for iteration in set(iterations.tolist())):
        raise RunDirectoryError(f"{path} cannot be read: its validations have different numbers of prompts ({FIX})")
    curve = Curve(tuple(prompts[first].tolist()), tuple(seeds[first].tolist()), tuple(trained))
    for iteration in dict.fromkeys(iterations.tolist()):
        rows = iterations == iteration
        scores = {head: arrays[head][rows] for head in heads}
        for head, values in scores.items():
            missing = np.isnan(values)
            if missing.all() or (missing != np.isnan(arrays[head][first])).any():
                raise RunDirectoryError(f"{path} cannot be read: column {shown(head)} lacks scores ({FIX})")
        curve = curve.extended(Validation(iteration, arrays["reward"][rows], scores))
    return curve
