"""One trial of a sweep: RDPO that begins with stage 1 and is evaluated on held-out prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import PlacementGroupFactory

from epd_ray.evaluation.statistics import bootstrap_mean
from epd_ray.evaluation.validation import Best
from epd_ray.prompts.splits import PromptSplits
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import rdpo_config
from epd_ray.runs.stage_one import fit_start_table, given_solver, made_by, weights_of
from epd_ray.runs.trainer import validate
from epd_ray.solvers import SolverTable
from epd_ray.stage_one.shard import as_table
from epd_ray.sweep.space import Plan

PLAN, PROMPTS, STATE = "plan", "prompts", "sweep"
SOLVER = "solver"
"""Folder of the best solver so far, inside every checkpoint."""
OBJECTIVE = "held_out/reward"
IMAGES = "images"


class SweepTrial(RDPO):
    """A Tune trainable of which one step is the iterations up to the next evaluation.

    Its configuration holds the plan, the prompts, and a value for each key of the space. It reports the number of
    images drawn, `held_out/reward` of the current policy, and `held_out/best` of the best table so far, with its
    interval.
    """

    def __init__(self, config: Mapping[str, Any], **kwargs: Any) -> None:
        plan: Plan = config[PLAN]
        self._plan, self._prompt_splits = plan, PromptSplits(**config[PROMPTS])
        self._values = {key: config[key] for key in plan.sweep.space}
        self._run_config = plan.trial(self._values)
        self._best, self._start_reward = Best(), float("nan")
        self._interval: dict[str, float] = {}
        super().__init__(self._rdpo_config(), **kwargs)

    def _rdpo_config(self) -> RDPOConfig:
        start = given_solver(self._run_config)
        prompts, table = self._prompt_splits, None if start is None else start.table
        built = rdpo_config(self._run_config, prompts.train, table, prompts.rows)
        return _with_room(built)

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """The resources of a trial, which are the same for all, because no key of the cluster section is swept."""
        return super().default_resource_request(_with_room(rdpo_config(config[PLAN].config, ["any"])))

    # -- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Train until the next evaluation is due, and evaluate."""
        iterations = self._run_config.rdpo.iterations
        if not self._best.found:
            self._begin()
        self.stop_after(iterations)
        end = min(self.policy_version + self._run_config.evaluation.every, iterations)
        result: dict[str, Any] = {}
        while self.policy_version < end:
            result = super().step()
        reward = self._evaluate(self.mean_table())
        return {
            **result,
            IMAGES: self.policy_version * self.config.batch_plan.images,
            "held_out": {"reward": reward, "start": self._start_reward, **self._interval, "at": self._best.iteration},
            "done": self.policy_version >= iterations,
        }

    def _begin(self) -> None:
        """Run stage 1 and evaluate its table; a restored trial has done so already."""
        run = self._run_config
        if run.distill.enabled and run.distill.table is None:
            self.rebase(as_table(fit_start_table(run, self._prompt_splits, self)))
        self._start_reward = self._evaluate(self.mean_table())

    def _evaluate(self, table: SolverTable) -> float:
        run = self._run_config.model_copy(update={"seed": self._plan.config.seed})
        interval = bootstrap_mean(validate(run, self._prompt_splits, self, table, self.policy_version).reward)
        if self._best.take(table, interval.mean, self.policy_version):
            self._interval = {"best": interval.mean, "low": interval.low, "high": interval.high}
        return interval.mean

    def get_auto_filled_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's metrics, with the values of this trial in place of its whole configuration."""
        return {**super().get_auto_filled_metrics(*args, **kwargs), "config": self._values}

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        super().save_checkpoint(checkpoint_dir)
        if self._best.found:
            about = {"rewards": weights_of(self._run_config), **self._best.about}
            solver = made_by(self._run_config, self.facts, self._best.table, **about)
            solver.save_pretrained(Path(checkpoint_dir) / SOLVER)

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        state = super().get_state(components, not_components=not_components, **kwargs)
        if self._best.found:
            state[STATE] = {"best": self._best.state(), "start": self._start_reward, "interval": self._interval}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if STATE in state:
            own = state[STATE]
            self._best, self._start_reward, self._interval = Best.restored(own["best"]), own["start"], own["interval"]


def _with_room(config: RDPOConfig) -> RDPOConfig:
    """Without rollout actors the trial's own process draws the pictures, and asks for the CPUs of a rollout actor."""
    if config.num_env_runners == 0:
        config.resources(num_cpus_for_main_process=config.num_cpus_per_env_runner)
    return config
