"""RLlib's learner, which is made again from its last state when its process dies."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE

from epd_ray.actors.pipeline import RolloutPipeline
from epd_ray.actors.reward_pool import ATTEMPTS
from epd_ray.actors.waiting import Watch
from epd_ray.errors import ModelError, is_own_bug
from epd_ray.rdpo.learner_group import LearnerLostError, SoleLearnerGroup

Answer = TypeVar("Answer")
LearnerState = dict[str, Any]
LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, LearnerLostError, IndexError)


class LastingLearner:
    """The learner group of an algorithm and the state after its last update.

    RLlib treats the death of a remote learner as fatal. The state is a few kilobytes, so the driver keeps it, builds a
    new group from it, and asks again.

    Args:
        group: the learner group as RLlib built it.
        rebuild: shuts the group down, waits for room, and builds a new one without weights.
        pipeline: told of the loss, so that added actors make room for the learner, and of the recovery.
        timeout_s: the seconds after which a learner actor that gives no answer counts as lost; None for no bound.
    """

    def __init__(
        self,
        group: SoleLearnerGroup,
        rebuild: Callable[[], SoleLearnerGroup],
        pipeline: RolloutPipeline,
        timeout_s: float | None,
    ) -> None:
        self._group, self._rebuild, self._pipeline, self._timeout_s = group, rebuild, pipeline, timeout_s
        self.state: LearnerState = self._fetch()

    def update(self, arguments: dict[str, Any]) -> Any:
        """Do one update and keep the state after it; RLlib's results.

        Args:
            arguments: the keyword arguments of LearnerGroup.update.

        Raises:
            ModelError: the learner's process died, or gave no answer in time, ATTEMPTS times over the update.
        """

        def ask() -> tuple[Any, LearnerState]:
            return self._group.update(**arguments), self._fetch()

        results, self.state = self._insist(ask)
        return results

    def take(self, state: LearnerState) -> None:
        """Give the learner another state.

        Raises:
            ModelError: the learner's process died, or gave no answer in time, ATTEMPTS times over it.
        """
        self.state = state

        def ask() -> LearnerState:
            self._group.set_state(self.state)
            return self._fetch()

        self.state = self._insist(ask)

    def refresh(self) -> None:
        """Keep the state that RLlib itself gave to the learner."""
        self.state = self._fetch()

    def _fetch(self) -> LearnerState:
        components = [f"{COMPONENT_LEARNER}/{part}" for part in (COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER)]
        state: LearnerState = self._group.get_state(components=components)
        return state

    def _insist(self, ask: Callable[[], Answer]) -> Answer:
        lost, late = None, False
        for _ in range(ATTEMPTS):
            try:
                if lost is not None:
                    self._group = self._rebuild()
                with Watch("the learner (its update)", self._group.actor, self._timeout_s, restarts=False) as watch:
                    if lost is not None:
                        self._group.set_state(self.state)
                    answer = ask()
            except LOST as error:
                # IndexError is RLlib's, where its only learner is dead; from within the learner it is a task's error.
                if self._group.is_local or isinstance(error, ray.exceptions.RayTaskError) or is_own_bug(error):
                    raise
                lost, late = lost or time.monotonic(), watch.late
                self._pipeline.give_way()
            else:
                if lost is not None:
                    self._pipeline.recovered(time.monotonic() - lost)
                return answer
        how = "gave no answer in time" if late else "died"
        guess = "does it hang, or is cluster.task_timeout_s too short?" if late else "out of memory?"
        raise ModelError(f"the learner: its process {how} {ATTEMPTS} times over the same update: {guess}")
