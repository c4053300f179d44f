"""The rollout actor, which is an EnvRunner of RLlib around a TaskRunner, and the pool of rollout actors."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.checkpoints import Checkpointable

from epd_ray.actors.pool import Bounds, Pool
from epd_ray.actors.tasks import Answer, Task, TaskRunner


class SolverEnvRunner(EnvRunner, Checkpointable):  # type: ignore[misc]
    """A rollout actor. It holds the frozen backbone but no policy: every job brings the parameters of the policy."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._runner = TaskRunner(config.worker_spec)

    def __repr__(self) -> str:  # Ray's dashboard and logs show this
        return f"rollout {self.worker_index}"

    def ready(self) -> None:
        """See TaskRunner.ready."""
        self._runner.ready()

    def run(self, task: Task) -> Answer:
        """See TaskRunner.run."""
        return self._runner.run(task)

    def sample(self, **kwargs: Any) -> None:
        """Raises RuntimeError, because rollout actors take tasks through `run`."""
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


def runner_pool(group: EnvRunnerGroup, most: int, timeout_s: float | None) -> Pool:
    """The rollout actors of RLlib as a pool. RLlib makes the actors, and the pool tells RLlib which of them are gone.

    Args:
        group: the group of SolverEnvRunner actors of RLlib.
        most: the largest number of rollout actors while nodes join. The pool never has fewer than at the start.
        timeout_s: seconds after which an actor that gives no answer counts as lost; None for no bound.
    """
    manager = group._worker_manager
    start = list(manager.actors().items())
    in_trial = ray.util.get_current_placement_group() is not None  # the resources of a Tune trial are fixed
    bounds = Bounds(len(start), len(start) if in_trial else max(most, len(start)))

    def make() -> tuple[int, ActorHandle[Any]]:
        group.add_workers(1)
        number = max(manager.actor_ids())
        return number, manager.actors()[number]

    # With two calls per actor the next batch is there already when the first one is done.
    return Pool(
        "rollout actors", start, make, lambda a: a.ready.remote(), bounds, 2, timeout_s, manager.remove_actor
    )  # fmt: skip
