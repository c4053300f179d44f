"""The rollout actor, which is RLlib's EnvRunner around a TaskRunner, and the pool of rollout actors."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.checkpoints import Checkpointable

from epd_ray.actors.pool import TASK_SECONDS, Bounds, Pool
from epd_ray.actors.tasks import Answer, Task, TaskRunner


class SolverEnvRunner(EnvRunner, Checkpointable):  # type: ignore[misc]
    """Holds a frozen backbone. It has no policy of its own: the parameters come with every job."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._runner = TaskRunner(config.worker_spec)

    def __repr__(self) -> str:  # what Ray's dashboard and logs call it
        return f"rollout {self.worker_index}"

    def ready(self) -> None:
        """See TaskRunner.ready."""
        self._runner.ready()

    def run(self, task: Task) -> Answer:
        """See TaskRunner.run."""
        return self._runner.run(task)

    def sample(self, **kwargs: Any) -> None:
        """Not used: tasks go through `run`."""
        raise RuntimeError("SolverEnvRunner takes tasks through run(), not sample()")

    def get_spaces(self) -> dict[str, tuple[Any, Any]]:
        spaces = (self.config.observation_space, self.config.action_space)
        return {INPUT_ENV_SPACES: spaces, INPUT_ENV_SINGLE_SPACES: spaces}

    def assert_healthy(self) -> None:
        return None

    def get_metrics(self) -> dict[str, Any]:
        return dict(self.metrics.reduce())

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        return None

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"config": self.config}


def runner_pool(group: EnvRunnerGroup, most: int, timeout_s: float | None = TASK_SECONDS) -> Pool:
    """RLlib's rollout actors as a pool. RLlib makes the actors, and is told of those that are gone.

    Args:
        group: RLlib's group of SolverEnvRunner actors.
        most: the largest number of rollout actors that there may be while nodes join; at least those of the start.
        timeout_s: seconds after which an actor that gives no answer counts as lost; None for no bound.
    """
    manager = group._worker_manager
    start = list(manager.actors().items())
    in_trial = ray.util.get_current_placement_group() is not None  # whose bundles are fixed
    bounds = Bounds(len(start), len(start) if in_trial else max(most, len(start)))

    def make() -> tuple[int, ActorHandle[Any]]:
        group.add_workers(1)
        number = max(manager.actor_ids())
        return number, manager.actors()[number]

    # The next batch waits at the actor already, so that it starts without asking the driver.
    return Pool(
        "rollout actors", start, make, lambda a: a.ready.remote(), bounds, 2, timeout_s, manager.remove_actor
    )  # fmt: skip
