"""A head's stage of the scoring pipeline, in a module with few imports, because every process of a pool imports it."""

import os
from collections.abc import Sequence

import pyarrow as pa
import ray

from epd_ray.actors.cluster import BrokenGpuError
from epd_ray.actors.reward_pool import RewardActor, RewardSpec, TimedScores, insist, start_head
from epd_ray.prompts.panel import Panel
from epd_ray.score.rows import score_rows
from epd_ray.types import ImageArray, Metadata


class HeadStage:
    """Scores batches of decoded rows with one head.

    Args:
        name: name of the head.
        spec: how the head is built.
        last: whether this is the last stage, which drops the pixels.
        panel: which rows the head judges, and what it reads of them; None where it judges all and reads nothing.
    """

    def __init__(self, name: str, spec: RewardSpec, last: bool, panel: Panel | None = None) -> None:
        self._name, self._last, self._panel = name, last, panel
        own = spec.python is None
        self._head = RewardActor(name, spec.target or spec.head, spec.options) if own else _Elsewhere(name, spec)

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            found = score_rows(table, self._name, lambda *batch: self._head.score(*batch).values, self._panel)
        except BrokenGpuError:
            if ray.get_runtime_context().was_current_actor_reconstructed:
                raise
            os._exit(1)  # Ray Data restarts the actor and gives it the rows again; the next error is raised above
        models = pa.array([self._head.model_id()] * len(found), pa.string())
        found = found.append_column(model_column(self._name), models)
        return found.drop_columns(["height", "width", "pixels"]) if self._last else found


class _Elsewhere:
    """Forwards to a head in another actor, which runs in a virtual environment of its own."""

    def __init__(self, name: str, spec: RewardSpec) -> None:
        asked = {"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus, "resources": dict(spec.resources)}
        self._what = f"reward head {name!r}"
        self._actor = start_head(name, spec, {**asked, "max_restarts": -1, "max_task_retries": 0})

    def score(
        self,
        images: ImageArray,
        prompts: Sequence[str],
        ids: Sequence[str],
        rows: Sequence[Metadata | None] | None = None,
    ) -> TimedScores:
        found: TimedScores = insist(
            self._actor, self._what, "scoring", lambda: self._actor.score.remote(images, prompts, ids, rows)
        )
        return found

    def model_id(self) -> str:
        return str(insist(self._actor, self._what, "loading", self._actor.model_id.remote))


def model_column(head: str) -> str:
    """The name of the column with the model_id of a head's model."""
    return f"model:{head}"
