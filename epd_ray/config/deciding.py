"""Which keys decide the results of a run, and which of these a run that has begun can still change.

Every key decides unless FREE lists it, so that a new key is never changed without a word.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from epd_ray.config.problems import flat
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import shown

Settings = dict[str, JsonValue]
"""Flat key -> value, such as {"rdpo.lr": 0.001}."""

_ACTORS = ("replicas", "min_replicas", "max_replicas", "num_cpus", "num_gpus", "resources")
_CLUSTER = (
    *("address", "dashboard", "placement_timeout_s", "task_timeout_s", "rollout_actors", "max_rollout_actors"),
    *("rollout_cpus", "rollout_gpus", "rollout_resources", "encoder_actors", "encoder_cpus", "encoder_gpus"),
    *("encoder_resources", "feature_gpus", "learner_actors", "learner_cpus", "learner_gpus", "env"),
    "py_modules",
)
FREE = (
    *("format", "name", "checkpoint.every", "checkpoint.keep", "store.images", "evaluation.pictures"),
    *("backbone.device", "backbone.offload", "backbone.vae_slicing", "backbone.embedding_cache_mib"),
    *("tracking.wandb", "tracking.mlflow"),
    *(f"rewards.*.{name}" for name in _ACTORS),
    *(f"cluster.{name}" for name in _CLUSTER),
)
"""Keys that do not decide: who computes and where, what is kept, and who is told. A part `*` stands for any name, and
a key stands for all keys below it too."""

PROMPTS, START = "prompts.json", "distilled/solver.json"
"""Files of a run that decide as keys do; PROMPTS has a key for each split, such as prompts.json:train."""
_POLICY = (
    *("solver.intervals", "solver.points", "solver.start_point", "rdpo.scale_dir", "rdpo.scale_time"),
    *("solver.grid", "solver.history", "solver.guidance", "solver.reuse"),
    *("rdpo.hidden_width", "rdpo.hidden_depth", "rdpo.concentration", "rdpo.concentration_bound", "rdpo.staleness"),
)
_MEASURE = (
    *("seed", "solver.afs", "solver.order", "rewards.*.head", "rewards.*.weight", "rdpo.normalisation"),
    *("backbone.family", "backbone.model", "backbone.revision", "backbone.guidance_scale", "backbone.resolution"),
    *("backbone.max_sequence_length", f"{PROMPTS}:validation", f"{PROMPTS}:rows", "prompts.heads"),
)
_START = ("distill", START, "prompts.train", "prompts.num_train", "prompts.validation", "prompts.test")
FIXED = {
    "the state of the policy was made with it": _POLICY,
    "the held-out rewards so far were measured with it": _MEASURE,
    "the start of the run was made with it": (*_START, "prompts.two_things"),
}
"""Why a key cannot change in a run that has begun -> the keys."""


@dataclass(frozen=True)
class Change:
    """A key that decides, and its values before and now; ABSENT stands for none."""

    key: str
    before: JsonValue
    now: JsonValue

    def __str__(self) -> str:
        before, now = ("absent" if value == ABSENT else shown(value) for value in (self.before, self.now))
        return f"{self.key} was {before}, now {now}"

    @property
    def obstacle(self) -> str | None:
        """Why a run that has begun cannot take this change; None if it can."""
        return next((why for why, keys in FIXED.items() if _listed(self.key, keys)), None)


ABSENT = "(absent)"


def deciding(config: RunConfig) -> Settings:
    """The keys of a configuration that decide the results of its run, with their values."""
    values = flat(config.model_dump(mode="json"))
    return {key: value for key, value in values.items() if value != {} and not _listed(key, FREE)}


def digest_without_seed(config: RunConfig) -> str:
    """Sixteen hexadecimal digits that runs have in common if nothing but the seed can make their results differ."""
    settings = {key: value for key, value in deciding(config).items() if key != "seed"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def changes(before: Mapping[str, JsonValue], now: Mapping[str, JsonValue]) -> list[Change]:
    """Every key whose value differs, in the order of the keys; of a head that came or went, its `head` alone."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if old != new and not _of_another_head(key, before, now):
            found.append(Change(key, old, new))
    return found


def _of_another_head(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    section, _, rest = key.partition(".")
    head = f"{section}.{rest.partition('.')[0]}.head"
    return section == "rewards" and key != head and not (head in before and head in now)


def _listed(key: str, patterns: tuple[str, ...]) -> bool:
    parts = key.split(".")
    return any(
        len(parts) >= len(pattern) and all(want in ("*", part) for want, part in zip(pattern, parts, strict=False))
        for pattern in (text.split(".") for text in patterns)
    )
