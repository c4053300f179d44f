"""RLlib's group of learners for the one learner that RDPO has."""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.util.metrics import Histogram

from epd_ray.actors.cluster import require_started
from epd_ray.actors.waiting import FIRST, Watch
from epd_ray.errors import ModelError


class LearnerLostError(ModelError):
    """The process of the learner died, or gave no answer, while it was built."""


class SoleLearnerGroup(LearnerGroup):  # type: ignore[misc]
    """One learner actor, or a learner in the driver.

    RLlib starts learner actors through Ray Train. Its process group, in which several learners share their gradients,
    opens ports on every network interface that ask for no credential. One learner has nobody to share gradients with,
    so this group starts the actor itself.

    Args:
        config: the configuration of the algorithm, with at most one learner.
        module_spec: the policy module.
        placement_group: the placement group of the actor; None for that of the caller.
    """

    def __init__(self, *, config: Any, module_spec: Any = None, placement_group: Any = None) -> None:
        self.actor: ActorHandle[Learner] | None = None
        """The learner actor; None where the driver learns."""
        if not config.num_learners:
            super().__init__(config=config, module_spec=module_spec, placement_group=placement_group)
            return
        self.config, self._module_spec = config.copy(copy_frozen=False), module_spec
        self._learner, self._is_shut_down, self._ts_dropped = None, False, 0
        self.actor = _start(self.config, module_spec, placement_group)
        self._workers = [self.actor]
        self._worker_manager = FaultTolerantActorManager(self._workers)
        self._metrics_update_time = Histogram(
            "rllib_learner_group_update_time", "Seconds of LearnerGroup.update()", [0.01, 0.1, 1, 10], ("rllib",)
        )
        self._metrics_update_time.set_default_tags({"rllib": type(self).__name__})

    def shutdown(self) -> None:
        """End the learner."""
        if self.actor is None:
            super().shutdown()
        else:
            ray.kill(self.actor)
        self._is_shut_down = True


def _start(config: Any, module_spec: Any, placement_group: Any) -> "ActorHandle[Learner]":
    """Start the actor of a learner and build the learner in it.

    Raises:
        PlacementError: the process did not start.
        LearnerLostError: the process died or gave no answer while the learner was built.
    """
    asked = {
        "num_cpus": config.num_cpus_per_learner,
        "num_gpus": config.num_gpus_per_learner,
        "resources": dict(config.custom_resources_per_learner or {}),
        "placement_group": placement_group or "default",
    }
    spec = module_spec or config.get_multi_rl_module_spec()
    actor = ray.remote(config.learner_class).options(**asked).remote(config=config, module_spec=spec)
    try:
        require_started({"learner": [actor]})
        with Watch("the learner (building)", actor, _first(config.task_timeout_s), restarts=False) as watch:
            ray.get(actor.build.remote())
    except ray.exceptions.RayActorError:
        how = "gave no answer in time" if watch.late else "died"
        raise LearnerLostError(f"the learner: its process {how} while it was built") from None
    except BaseException:
        ray.kill(actor)
        raise
    return actor


def _first(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else FIRST * timeout_s
