"""RLlib's learner, which is made again from its last state when its process dies."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE
from ray.rllib.core.learner.learner_group import LearnerGroup

from epd_ray.actors.pipeline import RolloutPipeline
from epd_ray.actors.reward_pool import ATTEMPTS
from epd_ray.errors import ModelError, is_own_bug

Answer = TypeVar("Answer")
LearnerState = dict[str, Any]


class LastingLearner:
    """The learner group of an algorithm and the state after its last update.

    RLlib treats the death of a remote learner as fatal. The state is a few kilobytes, so the driver keeps it, builds a
    new group from it, and asks again.

    Args:
        group: the learner group as RLlib built it.
        rebuild: shuts the group down, waits for room, and builds a new one without weights.
        pipeline: told of the loss, so that added actors make room for the learner, and of the recovery.
    """

    def __init__(self, group: LearnerGroup, rebuild: Callable[[], LearnerGroup], pipeline: RolloutPipeline) -> None:
        self._group, self._rebuild, self._pipeline = group, rebuild, pipeline
        self.state: LearnerState = self._fetch()

    def update(self, arguments: dict[str, Any]) -> Any:
        """Do one update and keep the state after it; RLlib's results.

        Args:
            arguments: the keyword arguments of LearnerGroup.update.

        Raises:
            ModelError: the learner's process died ATTEMPTS times over the update.
        """

        def ask() -> tuple[Any, LearnerState]:
            return self._group.update(**arguments), self._fetch()

        results, self.state = self._insist(ask)
        return results

    def take(self, state: LearnerState) -> None:
        """Give the learner another state.

        Raises:
            ModelError: the learner's process died ATTEMPTS times over it.
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
        lost = None
        for _ in range(ATTEMPTS):
            try:
                if lost is not None:
                    self._group = self._rebuild()
                    self._group.set_state(self.state)
                answer = ask()
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, IndexError) as error:
                # IndexError is RLlib's, where its only learner is dead; from within the learner it is a task's error.
                if self._group.is_local or isinstance(error, ray.exceptions.RayTaskError) or is_own_bug(error):
                    raise
                lost = lost or time.monotonic()
                self._pipeline.give_way()
            else:
                if lost is not None:
                    self._pipeline.recovered(time.monotonic() - lost)
                return answer
        raise ModelError(f"the learner: its process died {ATTEMPTS} times over the same update: out of memory?")
