"""RDPO: residual Dirichlet policy optimisation of a solver table, as an RLlib Algorithm."""

import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MEAN,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)
from ray.tune import PlacementGroupFactory

from epd_ray.actors.cluster import require_room, require_started, start_ray
from epd_ray.actors.encoder import ENCODERS, EncoderActor, start_encoder, wait_for_encoder
from epd_ray.actors.pipeline import Outcome, RolloutPipeline
from epd_ray.actors.reward_pool import RewardPool
from epd_ray.actors.tasks import Method, Task, rollout_task
from epd_ray.actors.waiting import Watch
from epd_ray.config.sections import DistillConfig, PromptsConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import BackboneFacts, require_guidance
from epd_ray.embedded.scenes import distinct_scenes
from epd_ray.errors import ConfigError
from epd_ray.policy.dirichlet import TableDistribution, clamp_scale_time
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.ahead import Ahead
from epd_ray.rdpo.batch import ScoredRollout, join, learner_arguments, summarise
from epd_ray.rdpo.clock import PhaseClock
from epd_ray.rdpo.config import RDPOConfig, placement
from epd_ray.rdpo.lasting_learner import LastingLearner
from epd_ray.rdpo.learner_group import SoleLearnerGroup
from epd_ray.rdpo.module import SolverTableModule
from epd_ray.rdpo.policy_window import PolicyWindow, rebased
from epd_ray.rdpo.runner import runner_pool
from epd_ray.rdpo.side_work import SideWork
from epd_ray.rdpo.surface import Refusals
from epd_ray.solvers import SolverTable
from epd_ray.stage_one.fit import StageOne, fit_table
from epd_ray.stage_one.shard import Parts, as_table
from epd_ray.telemetry.memory import Memory
from epd_ray.types import OnImages, Sampled

RDPO_RESULTS = "rdpo"
EMBEDDED_PROMPTS, EMBEDDED_HELD_OUT = PromptsConfig().num_train, PromptsConfig().validation
LOSSES = ("policy_loss", "approx_kl", "clipfrac", "behaviour_kl", "learning_rate")


@dataclass(frozen=True)
class Iteration:
    """What one training step did.

    Attributes:
        number: the number of updates after it, from 1.
        metrics: values by flat names such as losses/policy_loss, reward/<head> and time/<phase>.
        rollouts: every picture of the iteration, with its scores and its advantage.
    """

    number: int
    metrics: dict[str, float]
    rollouts: tuple[ScoredRollout, ...]


class RDPO(Refusals, Algorithm):  # type: ignore[misc]
    """Draws tables, makes pictures with them, scores the pictures, and updates the policy.

    The stages of up to `staleness` iterations overlap. Everything that an iteration does follows from the seed, the
    number of the iteration and the policy, so an iteration that is retried or resumed is the same.
    """

    config: RDPOConfig
    learner_group: SoleLearnerGroup

    @classmethod
    def get_default_config(cls) -> RDPOConfig:
        return RDPOConfig(cls)

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """RLlib's request and that of our own actors, which must live in the placement group of a Tune trial."""
        request = super().default_resource_request(config)
        own = config if isinstance(config, RDPOConfig) else cls.get_default_config().update_from_dict(config)
        asked = placement(own)
        extra = [bundle for kind in ("encoder actor", "reward actors") for bundle in asked[kind] if bundle]
        # RLlib sends rollout actor i to bundle i, after the trial's own: it must be there, though it asks for nothing.
        head = [{"memory": 1.0}] if request.head_bundle_is_empty else []
        return PlacementGroupFactory(head + request.bundles + extra, strategy=request.strategy)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def setup(self, config: RDPOConfig) -> None:
        own: RDPOConfig = self.config
        if not ray.is_initialized():
            start_ray()
        self._require_room(placement(own))
        self._closing = ExitStack()
        self._encoder: ActorHandle[EncoderActor] | None = None
        try:
            self._build(config)
        except BaseException:
            self.cleanup()  # nobody else holds the actors that are up already
            raise

    def _require_room(self, bundles: dict[str, list[dict[str, float]]]) -> None:
        if ray.util.get_current_placement_group() is None:  # under Tune the trial's group holds the room already
            require_room(bundles, self.config.placement_timeout_s)

    def _build(self, config: RDPOConfig) -> None:
        tag = f"{self.trial_id}-{os.getpid()}-{time.time_ns() % 10**6}"
        self._start_encoder(tag)
        self._tag = tag
        super().setup(config)

    def _set_up_metrics(self) -> None:
        """RLlib's metrics and our own parts: this is RLlib's last step before on_algorithm_init, which finds all."""
        super()._set_up_metrics()
        own: RDPOConfig = self.config
        self._start_pipeline(self._tag)
        self._mixer = own.mixer()
        self._side = SideWork(self._pipeline, own.images_per_job, list(own.reward_specs), self._mixer)
        self.facts: BackboneFacts = self.work("describe", [(own.table.intervals,)])[0]
        require_guidance(self.facts, scales=own.guidance, reuse=any(own.reuse))
        self._policies = PolicyWindow(own.policy_spec, own.staleness)
        self._learner = LastingLearner(
            self.learner_group, self._rebuild_learner_group, self._pipeline, own.task_timeout_s
        )
        self._policies.take(0, self._learner.state)
        scenes = distinct_scenes("train", EMBEDDED_PROMPTS, 0, 0.5)
        self._prompts = prompts = own.prompts or tuple(scene.caption for scene in scenes)
        self._ahead = Ahead(self._pipeline, self._policies, own.batch_plan, prompts, own.staleness, own.keep_images)
        self._started_training = False

    def _start_encoder(self, tag: str) -> None:
        """Start the encoder actor where one is asked for, and let the rollout actors know its name."""
        own: RDPOConfig = self.config
        if own.encoder_spec is None:
            return
        name, model = f"encoder:{tag}", own.backbone_spec
        self._encoder = start_encoder(name, model.family, model.options, own.encoder_spec)
        self._closing.callback(ray.kill, self._encoder)
        self._encoder.ready.remote().future()  # it loads while the others start
        self.config = own.copy(copy_frozen=False)
        self.config.backbone_spec = replace(model, encoder=name, encoder_timeout_s=own.task_timeout_s)
        self.config.freeze()

    def _start_pipeline(self, tag: str) -> None:
        """Start the reward actors and wait until every actor has its process and every head its model."""
        own: RDPOConfig = self.config
        rewards = self._rewards = RewardPool(own.reward_specs, tag, own.task_timeout_s, own.routes)
        self._closing.callback(rewards.stop)
        self._pipeline = RolloutPipeline(
            runner_pool(self.env_runner_group, own.max_env_runners, own.task_timeout_s),
            rewards,
            self.env_runner_group.local_env_runner,
        )
        self._closing.callback(self._pipeline.stop)
        require_started({"rollout actors": self._pipeline.runners, "reward actors": rewards.actors})
        rewards.wait_ready()
        if self._encoder is not None:
            wait_for_encoder(self._encoder, own.task_timeout_s)

    def _rebuild_learner_group(self) -> SoleLearnerGroup:
        """Another learner actor for one whose process died."""
        self.learner_group.shutdown()
        self._require_room({"learner": placement(self.config)["learner"]})
        self.learner_group = self.config.build_learner_group(rl_module_spec=self.config.get_multi_rl_module_spec())
        return self.learner_group

    def restore_env_runners(self, env_runner_group: EnvRunnerGroup) -> list[int]:
        """Nothing: the pipeline takes restarted actors back, and they hold no policy that would have to be sent."""
        return []

    def cleanup(self) -> None:
        self._closing.close()  # first: RLlib would wait for what its actors are at
        super().cleanup()

    # -- one iteration ------------------------------------------------------------------------------------------------

    def training_step(self) -> None:
        """Collect the scored rollouts of one iteration, learn from them, and keep the actors busy with the next."""
        self._begin_training()
        clock, iteration = PhaseClock(), self.policy_version

        # Draw and score. Most of the work was submitted while earlier iterations were learned from.
        with clock.phase("wait"):
            self._ahead.fill(iteration, needed=iteration)
            jobs, outcomes = self._ahead.collect(iteration)

        # Mix the scores of the heads into rewards, and compare each reward with its group.
        self._mixer.observe([outcome.scores for outcome in outcomes])
        rollouts, advantages = join(jobs, outcomes, self._mixer.train)
        metrics = summarise(rollouts, advantages, outcomes)

        # Learn: one pass of the clipped policy gradient, on the learner actor.
        with clock.phase("learn"):
            results = self._learner.update(learner_arguments(self.config.update_plan, rollouts, jobs[0]))
            self._policies.take(iteration + 1, self._learner.state)

        # Keep the actors busy with the iterations to come, which the new policy draws.
        self._ahead.fill(self.policy_version)
        self._pipeline.poll(0.0)

        # Log.
        metrics |= self._losses(results) | self._policies.metrics() | self._pipeline.take_metrics()
        metrics |= clock.metrics() | {"staleness": float(iteration - jobs[0].policy_version)}
        self.last = Iteration(self.policy_version, metrics, tuple(rollouts))
        self._log(metrics)

    def _begin_training(self) -> None:
        if not self.config.reward_specs:
            raise ConfigError(["rewards() names no head: nothing to learn from (distilling and sampling work)"])
        if not self._started_training:
            self._started_training = True
            self._pipeline.take_metrics()  # the waits of the start-up are not part of an iteration

    def _losses(self, results: Any) -> dict[str, float]:
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        return {f"losses/{n}": float(self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, n))) for n in LOSSES}

    def _log(self, metrics: dict[str, float]) -> None:
        images = self.config.batch_plan.images
        self.metrics.log_dict(metrics, key=RDPO_RESULTS, window=1)
        key = ENV_RUNNER_RESULTS
        self.metrics.log_value((key, EPISODE_RETURN_MEAN), metrics["reward/mean"], window=1)
        self.metrics.log_value((key, NUM_ENV_STEPS_SAMPLED), images, reduce="sum")
        self.metrics.log_value((key, NUM_ENV_STEPS_SAMPLED_LIFETIME), images, reduce="lifetime_sum")

    # -- the policy ---------------------------------------------------------------------------------------------------

    def get_module(self, module_id: str = DEFAULT_MODULE_ID) -> SolverTableModule | None:
        """A copy of the policy module with the newest weights; None for an id that is not the default one."""
        if module_id != DEFAULT_MODULE_ID:
            return None
        module: SolverTableModule = self.config.get_multi_rl_module_spec().build()[module_id]
        module.set_state(self._learner.state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][module_id])
        return module

    @property
    def policy_version(self) -> int:
        """The number of updates so far."""
        return self._policies.version

    def distribution(self) -> TableDistribution:
        """The current policy's distribution over tables."""
        return self._policies.distribution()

    def mean_table(self) -> SolverTable:
        """The solver to deploy: the mean of the current policy."""
        sigmas = torch.tensor(self.facts.sigmas, dtype=torch.float64)
        return clamp_scale_time(self.distribution().mean_table(), sigmas, self.facts.form)

    def rebase(self, table: SolverTable) -> None:
        """Start the policy from another table of the same shape; possible only before the first update.

        Raises:
            RuntimeError: training has begun.
        """
        if self.policy_version:
            raise RuntimeError(f"rebase after {self.policy_version} updates: make a new RDPO for another table")
        self._take_reuse(tuple(i in table.reused for i in range(table.intervals)) if table.reused else ())
        state = self._learner.state
        rebased(state, table, self.config.policy_spec, self.config.concentration)
        self.drop_ahead()
        self._learner.take(state)
        self._policies.take(0, self._learner.state)

    def _take_reuse(self, reuse: tuple[bool, ...]) -> None:
        """Let other intervals reuse the difference that the prompt makes, from now on."""
        if reuse == self.config.reuse:
            return
        chosen = self.config.copy(copy_frozen=False)
        chosen.reuse = reuse
        chosen.table = replace(chosen.table, reuse=torch.tensor(reuse) if any(reuse) else None)
        chosen.freeze()
        self.config = chosen
        self._policies.take_reuse(reuse)

    def distill(self) -> SolverTable:
        """Run stage 1: fit the table to a finer solver, on the first training prompts, and start the policy from it.

        Returns:
            The table [N, K], which is now the mean of the policy.

        Raises:
            RuntimeError: training has begun.
        """
        own, fit = self.config, DistillConfig()
        prompts = self._prompts[: fit.prompts]
        stage = StageOne(
            intervals=own.table.intervals,
            points=own.table.points,
            prompts=prompts,
            noise_seeds=tuple(noise_seeds(Purpose.STAGE_ONE, own.seed or 0, len(prompts))),
            shard_size=own.images_per_job,
            teacher_steps=fit.teacher_steps,
            grid=fit.grid,
            min_weight=fit.min_weight,
            afs=own.afs,
            order=own.order,
            start_point=own.table.start_point,
            scale_range=fit.scale_range if own.scale_dir else 0.0,
            noise_levels=own.grid,
            parts=Parts(own.history, own.guidance, tuple(i for i, reused in enumerate(own.reuse) if reused)),
            guidance_scale=self.facts.guidance_scale,
        )
        table = as_table(fit_table(self.work, stage, self.facts.sigmas))
        self.rebase(table)
        return table

    def stop_after(self, iteration: int) -> None:
        """Draw nothing beyond an iteration, since it will be the last."""
        self._ahead.last_iteration = iteration

    def drop_ahead(self) -> None:
        """Forget what is drawn for iterations to come."""
        self._ahead.drop(self.policy_version)

    # -- beside training ----------------------------------------------------------------------------------------------

    def sample_scored(
        self,
        sampler: Sampler,
        prompts: Sequence[str],
        noise_seeds: Sequence[int],
        on_images: OnImages | None = None,
    ) -> Sampled:
        """Draw pictures and score them on the actors of the run, in the same fixed batches, a few batches at a time.

        Args:
            sampler: any solver. A table of shape [B, N, K] gives each picture a table of its own.
            prompts: B prompts.
            noise_seeds: B seeds, one for the initial noise of each picture.
            on_images: called with the index of a batch's first picture and its pictures, as each batch comes. Without
                it the pictures do not come to the driver.

        Returns:
            Scores by head, in the order of the prompts. Without heads there are no scores, and each reward is NaN.
        """
        return self._side.sample_scored(sampler, prompts, noise_seeds, on_images)

    def sample_each(self, drawings: Sequence[tuple[Sampler, Sequence[str], Sequence[int]]]) -> list[Sampled]:
        """The same as `sample_scored` for several samplers at a time, so that few pictures of each keep actors busy.

        Args:
            drawings: samplers, each with its prompts and one noise seed per prompt.

        Returns:
            What each one drew, in order.
        """
        return self._side.sample_each(drawings)

    @property
    def images_at_once(self) -> int:
        """The largest number of pictures that are drawn, scored or on their way to the driver at a time."""
        return self._side.images_at_once

    def stream(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Do any number of tasks, a few at a time; yields each with its outcome as it ends, in any order."""
        return self._pipeline.stream(tasks)

    def truncated(self, prompts: Sequence[str]) -> int:
        """The number of prompts that are longer than the model reads."""
        count: int = self.work("truncated", [(tuple(prompts),)])[0]
        return count

    def work(self, method: Method, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of the rollout workers once for each tuple of arguments; the answers, in order."""
        return self._side.work(method, arguments)

    def rehearse(self) -> list[Outcome]:
        """Draw and score two jobs of the first iteration, one after the other, and learn nothing."""
        jobs = self._ahead.jobs(0)
        return [self._side.run([rollout_task(job)])[0] for job in (jobs[0], jobs[min(1, len(jobs) - 1)])]

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Score the policy's mean table on the held-out prompts, with the same noise at each call.

        Returns:
            The mean reward as env_runners/episode_return_mean, and the mean score of each head as reward/<head>.

        Raises:
            ConfigError: there are training prompts but no held-out ones, or no reward head.
        """
        own: RDPOConfig = self.config
        if not own.reward_specs or (own.prompts and not own.held_out):
            missing = "held-out prompts: set rollouts(held_out=[...])" if own.reward_specs else "a head in rewards()"
            raise ConfigError([f"evaluate() needs {missing}"])
        prompts = own.held_out or tuple(s.caption for s in distinct_scenes("validation", EMBEDDED_HELD_OUT, 0, 0.5))
        about = {"algorithm": self, "metrics_logger": self.metrics}
        make_callback("on_evaluate_start", self.callbacks, own.callbacks_on_evaluate_start, kwargs=about)
        sampler = Sampler("epd", own.table.intervals, "held-out", "held-out", self.mean_table(), own.afs, own.order)
        found = self.sample_scored(sampler, prompts, noise_seeds(Purpose.VALIDATION, own.seed or 0, len(prompts)))
        drawn = {EPISODE_RETURN_MEAN: float(found.reward.mean()), NUM_ENV_STEPS_SAMPLED: len(prompts)}
        judged = {head: values[~np.isnan(values)] for head, values in found.scores.items()}
        scores = {f"reward/{head}": float(values.mean()) for head, values in judged.items() if len(values)}
        results = about["evaluation_metrics"] = {ENV_RUNNER_RESULTS: drawn, **scores}
        make_callback("on_evaluate_end", self.callbacks, own.callbacks_on_evaluate_end, kwargs=about)
        return results

    @classmethod
    def _should_create_evaluation_env_runners(cls, eval_config: Any) -> bool:
        return False  # the rollout actors of the training draw the held-out prompts too

    def memory(self) -> dict[str, Memory]:
        """Peak memory of the actor of each kind that answered last; of the driver, where it does the work itself."""
        if self._encoder is None:
            return self._pipeline.memory
        with Watch(f"{ENCODERS} (their memory)", self._encoder, self.config.task_timeout_s):
            return self._pipeline.memory | {"encoder": ray.get(self._encoder.memory.remote())}

    # -- state --------------------------------------------------------------------------------------------------------

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        state[RDPO_RESULTS] = self._own_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if RDPO_RESULTS in state:
            self._learner.refresh()
            self._take_over(state[RDPO_RESULTS])

    def export_state(self) -> dict[str, Any]:
        """What a run needs to go on exactly: learner, optimiser and recent policies, as plain numbers and arrays."""
        return {RDPO_RESULTS: self._own_state(), COMPONENT_LEARNER: self._learner.state[COMPONENT_LEARNER]}

    def _own_state(self) -> dict[str, Any]:
        parts = {"window": self._policies.state(), "mixer": self._mixer.state(), "reuse": list(self._policies.reuse)}
        return {"iteration": self.policy_version, **parts}

    def import_state(self, state: dict[str, Any]) -> None:
        """Go on from `export_state`."""
        self._learner.take({COMPONENT_LEARNER: state[COMPONENT_LEARNER]})
        self._take_over(state[RDPO_RESULTS])

    def _take_over(self, own: dict[str, Any]) -> None:
        self._mixer.restore(own["mixer"])
        self._take_reuse(tuple(own.get("reuse", self.config.reuse)))
        self._policies.restore(own["window"])
        self._policies.take(own["iteration"], self._learner.state)
        self.drop_ahead()

    def checksum(self) -> int:
        """CRC of the current policy's parameters; equal runs have equal ones."""
        return zlib.crc32(self._policies.parameters().tobytes())
