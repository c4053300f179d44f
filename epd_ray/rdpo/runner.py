"""The rollout actor: RLlib's EnvRunner around TaskRunner."""

from collections.abc import Mapping
from typing import Any

from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable

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
