"""The held-out curve of a run: every prompt's scores at each validation, what was gained, what was lost.

Each validation draws the same prompts with the same seeds, so that two of them are compared prompt by prompt: most of a
mean's uncertainty is the prompts', which such a difference leaves out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.statistics import Interval, bootstrap_mean, paired_difference
from epd_ray.solvers import SolverTable
from epd_ray.storage.run_directory import whole
from epd_ray.types import FloatArray

SCHEMA_VERSION = 1
ALARM_CONFIDENCE = 0.99  # many heads are looked at many times
STOPPED = {
    "patience": "the held-out reward has stopped getting better",
    "alarm": "what is not trained on fell while the reward rose",
}
"""Why fine-tuning may end before its last iteration."""


@dataclass(frozen=True)
class Validation:
    """One table on the validation prompts.

    Attributes:
        iteration: updates behind it; 0 is the table of the start.
        reward: [B], what is learned from.
        scores: head -> raw scores [B]; scene accuracy too, where the prompts are scenes.
    """

    iteration: int
    reward: FloatArray
    scores: Mapping[str, FloatArray]


@dataclass(frozen=True)
class Fall:
    """A head that lost while the reward gained.

    Attributes:
        head: its name.
        drop: its paired difference to the start, with its 99 % interval, all of it below 0.
    """

    head: str
    drop: Interval

    def __str__(self) -> str:
        low_high = f"[{self.drop.low:+.4f}, {self.drop.high:+.4f}]"
        return f"{self.head} {self.drop.mean:+.4f} {low_high}"


@dataclass(frozen=True)
class Curve:
    """The validations of a run so far, the start's first.

    Attributes:
        prompts: B prompts.
        seeds: their noise seeds.
        trained: the heads that are learned from; all other scores are only watched.
        validations: in order of iteration.
        progress: index of the last one that was better than the one so marked before it, its paired interval above 0.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    trained: tuple[str, ...]
    validations: tuple[Validation, ...] = ()
    progress: int = 0

    @property
    def heads(self) -> tuple[str, ...]:
        """All that is scored."""
        return tuple(self.validations[0].scores) if self.validations else ()

    @property
    def watched(self) -> tuple[str, ...]:
        """What is scored and not learned from."""
        return tuple(head for head in self.heads if head not in self.trained)

    @property
    def stalled(self) -> int:
        """Validations since the last progress."""
        return max(0, len(self.validations) - 1 - self.progress)

    def extended(self, found: Validation) -> "Curve":
        """With one more validation."""
        validations = (*self.validations, found)
        if len(validations) == 1:
            return replace(self, validations=validations)
        gain = paired_difference(found.reward, validations[self.progress].reward)
        return replace(self, validations=validations, progress=len(self.validations) if gain.low > 0 else self.progress)

    def gain(self, index: int = -1) -> Interval:
        """Paired difference of a validation's reward to the start's."""
        return paired_difference(self.validations[index].reward, self.validations[0].reward)

    def head_gain(self, head: str, index: int = -1, confidence: float = 0.95) -> Interval:
        """The same of one head's raw scores."""
        now, start = (self.validations[i].scores[head] for i in (index, 0))
        return paired_difference(now, start, confidence=confidence)

    def falls(self, index: int = -1) -> list[Fall]:
        """Reward hacking: watched heads significantly below the start, while the reward is significantly above it.

        The heads' intervals are of 99 %: one that nothing happens to still falls in 1 of 200 such validations.
        """
        if not self.validations or self.gain(index).low <= 0:
            return []
        found = [Fall(head, self.head_gain(head, index, ALARM_CONFIDENCE)) for head in self.watched]
        return [fall for fall in found if fall.drop.high < 0]

    def onset(self, index: int = -1) -> list[Fall]:
        """Of a validation's falls those that the one before did not have."""
        index %= len(self.validations)
        before = {fall.head for fall in self.falls(index - 1)} if index else set()
        return [fall for fall in self.falls(index) if fall.head not in before]

    def alarm(self, index: int = -1) -> str | None:
        """What to say at the onset of a fall."""
        if not (begun := self.onset(index)):
            return None
        where = f"at iteration {self.validations[index].iteration} the held-out reward is up by"
        fell = "; ".join(map(str, begun))
        return f"reward hacking? {where} {self.gain(index).mean:+.4f}, but what it is not trained on fell: {fell}"

    def metrics(self) -> dict[str, float]:
        """A row's entries for the last validation."""
        last = self.validations[-1]
        reward, gain = bootstrap_mean(last.reward), self.gain()
        alarm = {"alarm/reward_hacking": float(bool(self.falls()))} if self.watched else {}
        return {
            **{f"validation/{head}": float(np.mean(values)) for head, values in last.scores.items()},
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
        """Numbers and arrays, to go on exactly."""
        rows = [{"iteration": v.iteration, "reward": v.reward, "scores": dict(v.scores)} for v in self.validations]
        return {"progress": self.progress, "validations": rows}

    def restored(self, state: Mapping[str, Any]) -> "Curve":
        """On the same prompts, as it was at `state`."""
        return replace(
            self, validations=tuple(Validation(**v) for v in state["validations"]), progress=state["progress"]
        )

    def table(self) -> pa.Table:
        """One row per validation and prompt."""
        count, times = len(self.prompts), len(self.validations)
        columns = {
            "iteration": pa.array(np.repeat([v.iteration for v in self.validations], count), pa.int32()),
            "prompt": pa.array(self.prompts * times, pa.string()),
            "noise_seed": pa.array(self.seeds * times, pa.int64()),
            "reward": np.concatenate([v.reward for v in self.validations]),
            **{head: np.concatenate([v.scores[head] for v in self.validations]) for head in self.heads},
        }
        about = {"schema_version": str(SCHEMA_VERSION), "trained": json.dumps(self.trained)}
        return pa.table(columns).replace_schema_metadata(about)


@dataclass
class Best:
    """The best table so far by held-out reward."""

    reward: float = -np.inf
    iteration: int = -1
    positions: Any = None
    weights: Any = None
    scale_dir: Any = None
    scale_time: Any = None

    @property
    def table(self) -> SolverTable:
        def tensor(values: Any) -> torch.Tensor | None:
            return None if values is None else torch.as_tensor(np.array(values))

        positions, weights = tensor(self.positions), tensor(self.weights)
        assert positions is not None and weights is not None
        return SolverTable(positions, weights, tensor(self.scale_dir), tensor(self.scale_time))

    @property
    def about(self) -> dict[str, Any]:
        """What its solver says of how it came about."""
        stage = "rdpo" if self.iteration else "distilled"
        return {"stage": stage, "iteration": self.iteration, "validation_reward": round(self.reward, 6)}

    def take(self, table: SolverTable, reward: float, iteration: int) -> bool:
        """Keep the table if it is better."""
        if reward <= self.reward:
            return False
        self.reward, self.iteration = reward, iteration
        for name in ("positions", "weights", "scale_dir", "scale_time"):
            values = getattr(table, name)
            setattr(self, name, None if values is None else values.numpy())
        return True


def write_curve(path: Path, curve: Curve) -> None:
    """Every prompt's scores as Parquet, whole or not at all.

    Raises:
        RunDirectoryError: the disk refuses.
    """
    with whole(path) as partial:
        pq.write_table(curve.table(), partial, compression="zstd")


def read_curve(path: Path) -> Curve | None:
    """What `write_curve` wrote; None where there is no such file.

    Raises:
        RunDirectoryError: it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        trained: Sequence[str] = json.loads((table.schema.metadata or {})[b"trained"])
        iterations = np.asarray(table["iteration"])
        heads = [name for name in table.column_names if name not in ("iteration", "prompt", "noise_seed", "reward")]
        arrays = {name: np.asarray(table[name], np.float32) for name in ("reward", *heads)}
        prompts, seeds = np.asarray(table["prompt"]), np.asarray(table["noise_seed"])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not len(iterations):
        raise RunDirectoryError(f"{path} cannot be read: it has no rows")
    first = iterations == iterations[0]
    curve = Curve(tuple(prompts[first].tolist()), tuple(seeds[first].tolist()), tuple(trained))
    for iteration in dict.fromkeys(iterations.tolist()):
        rows = iterations == iteration
        scores = {head: arrays[head][rows] for head in heads}
        curve = curve.extended(Validation(iteration, arrays["reward"][rows], scores))
    return curve
