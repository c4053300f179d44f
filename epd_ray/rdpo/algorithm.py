"""RDPO: residual Dirichlet policy optimisation of a solver table, as an RLlib Algorithm."""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID, Columns
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MEAN,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)
from ray.tune import PlacementGroupFactory

from epd_ray.actors import RewardPool, require_room, start_ray
from epd_ray.distill import DistillTask, Fit, best_points, position_grid
from epd_ray.rdpo.batch import Row, join, propose, summarise
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.dirichlet import TableDistribution, base_parameters, clamp_scale_time
from epd_ray.rdpo.learner import ADVANTAGES
from epd_ray.rdpo.pipeline import Outcome, RolloutPipeline
from epd_ray.rdpo.policy import PolicyNetwork
from epd_ray.rdpo.runner import Task
from epd_ray.rollout import BackboneFacts
from epd_ray.sampling import Sampler
from epd_ray.scoring import mix
from epd_ray.shapes.scenes import distinct_scenes
from epd_ray.solvers import SolverTable
from epd_ray.types import FloatArray, RolloutJob, Sampled

RDPO_RESULTS = "rdpo"
EMBEDDED_PROMPTS = 256


@dataclass(frozen=True)
class Iteration:
    """What one training step did.

    Attributes:
        number: from 1.
        metrics: flat names (losses/policy_loss, reward/<head>, time/<phase>) to values.
        rows: one dict per rollout, ready for store.rollout_table.
    """

    number: int
    metrics: dict[str, float]
    rows: tuple[Row, ...]


class RDPO(Algorithm):  # type: ignore[misc]
    """Draws tables, makes pictures, scores them, updates the policy; the stages overlap by `max_staleness` iterations.

    Everything an iteration does follows from (seed, iteration, policy), so a retried or resumed one is the same.
    """

    learner_group: LearnerGroup

    @classmethod
    def get_default_config(cls) -> RDPOConfig:
        return RDPOConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """RLlib's request plus the reward actors: under Tune they must live in the trial's placement group."""
        request = super().default_resource_request(config)
        own = config if isinstance(config, RDPOConfig) else cls.get_default_config().update_from_dict(config)
        rewards = [spec.bundle for spec in own.reward_specs.values() for _ in range(spec.replicas) if spec.bundle]
        return PlacementGroupFactory(request.bundles + rewards, strategy=request.strategy)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def setup(self, config: RDPOConfig) -> None:
        own: RDPOConfig = self.config
        if not ray.is_initialized():
            start_ray()
        if not ray.util.get_current_placement_group():  # under Tune the trial's group holds the room already
            require_room(_bundles(own))
        self._rewards: RewardPool | None = None
        try:
            self._build(config)
        except BaseException:
            self.cleanup()  # nobody else holds the actors that are up already
            raise

    def _build(self, config: RDPOConfig) -> None:
        own: RDPOConfig = self.config
        super().setup(config)
        self._prompts = own.prompts or tuple(s.caption for s in distinct_scenes("train", EMBEDDED_PROMPTS, 0, 0.5))
        self._rewards = RewardPool(own.reward_specs, f"{self.trial_id}-{os.getpid()}-{time.time_ns() % 10**6}")
        self._pipeline = RolloutPipeline(self.env_runner_group, self._rewards)
        self._rewards.wait_ready()
        self.facts: BackboneFacts = self._run([Task("describe", "describe", (own.table.intervals,))])[0].value
        self._iteration_done = 0
        self._submitted = 0
        self._window: OrderedDict[int, FloatArray] = OrderedDict()
        self._sample_calls = 0
        self.last_iteration: int | None = None  # nothing is drawn beyond it
        self._remember(self._fetch_learner_state())

    def restore_env_runners(self, env_runner_group: EnvRunnerGroup) -> list[int]:
        """Take restarted actors back. They hold no policy, so there is no learner state to send them."""
        restored: list[int] = env_runner_group.probe_unhealthy_env_runners()
        return restored

    def cleanup(self) -> None:
        super().cleanup()
        if self._rewards is not None:
            self._rewards.stop()

    def _run(self, tasks: Sequence[Task]) -> list[Outcome]:
        self._pipeline.submit(tasks)
        return self._pipeline.collect([t.task_id for t in tasks])

    # -- the policy at the driver -------------------------------------------------------------------------------------

    def _fetch_learner_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.learner_group.get_state(
            components=[f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", f"{COMPONENT_LEARNER}/{COMPONENT_OPTIMIZER}"]
        )
        return state

    def _remember(self, state: dict[str, Any]) -> None:
        """Keep the learner's small state: it feeds the rollouts, the checkpoints, and a learner that must be remade."""
        self._learner_state = state
        network = PolicyNetwork(self.config.policy_spec)
        module = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        network.load_state_dict({k.removeprefix("policy."): torch.as_tensor(np.array(v)) for k, v in module.items()})
        self._base = torch.as_tensor(np.array(module["policy.base"]))
        self._window[self._iteration_done] = network.parameters_array()
        while len(self._window) > self.config.max_staleness + 1:
            self._window.popitem(last=False)

    @property
    def policy_version(self) -> int:
        """Number of updates so far."""
        return self._iteration_done

    def distribution(self) -> TableDistribution:
        """The current policy's distribution over tables."""
        return TableDistribution(self.config.space, torch.from_numpy(self._window[self._iteration_done]))

    def mean_table(self) -> SolverTable:
        """The solver to deploy: the mean of the current policy."""
        sigmas = torch.tensor(self.facts.sigmas, dtype=torch.float64)
        return clamp_scale_time(self.distribution().mean_table(), sigmas, self.facts.form)

    def rebase(self, table: SolverTable) -> None:
        """Start the policy from another table of the same shape; only before the first update.

        Raises:
            RuntimeError: training has begun.
        """
        if self._iteration_done:
            raise RuntimeError(f"rebase after {self._iteration_done} updates: make a new RDPO for another table")
        base = base_parameters(table, self.config.space, self.config.concentration)
        module = self._learner_state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        module["policy.base"] = base.numpy()
        self.learner_group.set_state(self._learner_state)
        self._pipeline.discard()
        self._submitted = 0
        self._remember(self._fetch_learner_state())

    # -- proposing ----------------------------------------------------------------------------------------------------

    def _jobs(self, iteration: int) -> list[RolloutJob]:
        version = max(0, iteration - self.config.max_staleness)
        parameters = self._window[version]
        requests = propose(self.config, self._prompts, iteration)
        return [RolloutJob((iteration, i), version, parameters, r) for i, r in enumerate(requests)]

    def _fill(self) -> None:
        """Submit iterations up to the staleness bound."""
        end = self._iteration_done + self.config.max_staleness
        if self.last_iteration is not None:
            end = min(end, max(self.last_iteration - 1, self._iteration_done))
        while self._submitted <= end:
            self._pipeline.submit(_rollout_task(job) for job in self._jobs(self._submitted))
            self._submitted += 1

    # -- one iteration ------------------------------------------------------------------------------------------------

    def training_step(self) -> None:
        """Collect one iteration's scored rollouts, learn from them, and keep the actors busy with the next."""
        start = time.perf_counter()
        iteration = self._iteration_done
        self._fill()
        jobs = self._jobs(iteration)
        outcomes = self._pipeline.collect([_task_id(job) for job in jobs])
        collected = time.perf_counter()
        rows, advantages = join(jobs, outcomes, self.config.normalisations)
        metrics = summarise(rows, advantages, outcomes)
        losses = self._learn(rows, jobs[0])
        learned = time.perf_counter()
        self._fill()
        self._pipeline.poll()
        metrics |= losses | self._policy_metrics()
        metrics |= {
            "time/wait": collected - start,
            "time/learn": learned - collected,
            "time/iteration": time.perf_counter() - start,
            "staleness": float(iteration - jobs[0].policy_version),
            "retries": float(self._pipeline.retries),
        }
        self.last = Iteration(self._iteration_done, metrics, tuple(rows))
        self._log(metrics)

    def _learn(self, rows: Sequence[Row], job: RolloutJob) -> dict[str, float]:
        shape = (len(rows), *job.parameters.shape[:1], self.config.space.action_width)
        batch = SampleBatch(
            {
                Columns.OBS: np.zeros((len(rows), 1), np.float32),
                Columns.ACTIONS: np.array([r["action"] for r in rows], np.float32).reshape(shape),  # [B, N, A]
                Columns.ACTION_LOGP: np.array([r["log_prob"] for r in rows], np.float64),
                ADVANTAGES: np.array([r["advantage"] for r in rows], np.float32),
            }
        )
        steps = {
            "iteration": self._iteration_done,
            "staleness": self._iteration_done - job.policy_version,
            NUM_ENV_STEPS_SAMPLED_LIFETIME: (self._iteration_done + 1) * len(rows),
        }
        arguments = {
            "batch": MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(rows)),
            "timesteps": steps,
            "num_epochs": self.config.num_epochs,
            "minibatch_size": min(self.config.minibatch_size, len(rows)),
            "shuffle_batch_per_epoch": self.config.shuffle_batch_per_epoch,
        }
        try:
            results, state = self._update(arguments)
        except (ray.exceptions.RayActorError, IndexError):  # the latter is RLlib's, for no answer from the only learner
            self._remake_learner()
            results, state = self._update(arguments)
        self._iteration_done += 1
        self._remember(state)
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        names = ("policy_loss", "approx_kl", "clipfrac", "behaviour_kl")
        return {f"losses/{n}": float(self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, n))) for n in names}

    def _update(self, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return self.learner_group.update(**arguments), self._fetch_learner_state()

    def _remake_learner(self) -> None:
        """A dead learner actor is replaced by one with the state after the last update."""
        self.learner_group.shutdown()
        self.learner_group = self.config.build_learner_group(rl_module_spec=self.config.get_multi_rl_module_spec())
        self.learner_group.set_state(self._learner_state)

    def _policy_metrics(self) -> dict[str, float]:
        policy = self.distribution()
        base = TableDistribution(self.config.space, self._base)
        totals = torch.cat([d.concentration.sum(-1) for d in (policy.segments, policy.weights)])
        return {
            "policy/kl_to_base": float(policy.kl_per_interval(base).sum()),
            "policy/entropy": float(policy.entropy_per_interval().sum()),
            "policy/concentration": float(totals.mean()),
        }

    def _log(self, metrics: dict[str, float]) -> None:
        images = self.config.images_per_iteration
        self.metrics.log_dict(metrics, key=RDPO_RESULTS, window=1)
        key = ENV_RUNNER_RESULTS
        self.metrics.log_value((key, EPISODE_RETURN_MEAN), metrics["reward/mean"], window=1)
        self.metrics.log_value((key, NUM_ENV_STEPS_SAMPLED), images, reduce="sum")
        self.metrics.log_value((key, NUM_ENV_STEPS_SAMPLED_LIFETIME), images, reduce="lifetime_sum")

    # -- beside training ----------------------------------------------------------------------------------------------

    def sample_scored(
        self, sampler: Sampler, prompts: Sequence[str], noise_seeds: Sequence[int], keep_images: bool = False
    ) -> Sampled:
        """Draw and score pictures on the same actors, in the same fixed batches.

        Args:
            sampler: any solver.
            prompts: B prompts.
            noise_seeds: B seeds.
            keep_images: bring the pictures to the driver.
        """
        self._sample_calls += 1
        size = self.config.images_per_job
        tasks = []
        for i in range(0, len(prompts), size):
            part, seeds = tuple(prompts[i : i + size]), tuple(noise_seeds[i : i + size])
            ids = tuple(f"{sampler.key}:{j}" for j in range(i, i + len(part)))
            name = f"sample-{self._sample_calls}-{i}"
            tasks.append(Task(name, "sample", (sampler, part, seeds), part, ids, score=True, keep_images=keep_images))
        outcomes = self._run(tasks)
        scores = {h: np.concatenate([o.scores[h] for o in outcomes]) for h in self.config.reward_specs}
        images = np.concatenate([o.images for o in outcomes if o.images is not None]) if keep_images else None
        reward = mix(scores, self.config.normalisations)
        return Sampled(scores, reward, images, sum(o.generate_seconds for o in outcomes))

    def distill(
        self, prompts: Sequence[str], noise_seeds: Sequence[int], *, grid: int, teacher_steps: int, min_weight: float
    ) -> list[Fit]:
        """Stage 1 on the rollout actors: the least-squares table, one fit per interval.

        Args:
            prompts: to follow the teacher on.
            noise_seeds: one each.
            grid: number of positions to try.
            teacher_steps: of the teacher, per interval.
            min_weight: of each point.
        """
        positions = position_grid(grid)
        size = self.config.images_per_job
        fits: list[Fit] = []
        for interval in range(self.config.table.intervals):
            so_far = tuple(f.positions for f in fits), tuple(f.weights for f in fits)
            tasks = []
            for i in range(0, len(prompts), size):
                shard = tuple(prompts[i : i + size]), tuple(noise_seeds[i : i + size])
                work = DistillTask(self.config.table.intervals, *so_far, positions, teacher_steps, *shard)
                tasks.append(Task(f"distill-{interval}-{i}", "distill", (work,)))
            parts = [outcome.value for outcome in self._run(tasks)]
            equations = parts[0]
            for part in parts[1:]:
                equations = equations + part
            fits.append(best_points(equations, positions, self.config.table.points, min_weight))
        return fits

    # -- state --------------------------------------------------------------------------------------------------------

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        state[RDPO_RESULTS] = {"iteration": self._iteration_done, "window": dict(self._window)}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if RDPO_RESULTS in state:
            self._take_over(state[RDPO_RESULTS])

    def export_state(self) -> dict[str, Any]:
        """What a run needs to go on exactly: learner, optimiser, staleness window. Plain numbers and arrays."""
        own = {"iteration": self._iteration_done, "window": dict(self._window)}
        return {RDPO_RESULTS: own, COMPONENT_LEARNER: self._learner_state[COMPONENT_LEARNER]}

    def import_state(self, state: dict[str, Any]) -> None:
        """Go on from `export_state`."""
        self.learner_group.set_state({COMPONENT_LEARNER: state[COMPONENT_LEARNER]})
        self._take_over(state[RDPO_RESULTS])

    def _take_over(self, own: dict[str, Any]) -> None:
        self._pipeline.discard()
        self._iteration_done = self._submitted = own["iteration"]
        self._window = OrderedDict((int(v), np.asarray(p, np.float32)) for v, p in sorted(own["window"].items()))
        self._remember(self._fetch_learner_state())

    def checksum(self) -> int:
        """CRC of the current parameters: equal for equal runs."""
        return zlib.crc32(self._window[self._iteration_done].tobytes())


def _task_id(job: RolloutJob) -> str:
    return f"rollout-{job.job_id[0]}-{job.job_id[1]}"


def _rollout_task(job: RolloutJob) -> Task:
    prompts = tuple(r.prompt for r in job.requests)
    return Task(_task_id(job), "generate", (job,), prompts, tuple(r.rollout_id for r in job.requests), score=True)


def _bundles(config: RDPOConfig) -> dict[str, list[dict[str, float]]]:
    runner = {"CPU": config.num_cpus_per_env_runner, "GPU": config.num_gpus_per_env_runner}
    runner |= config.custom_resources_per_env_runner
    learner = {"CPU": config.num_cpus_per_learner, "GPU": config.num_gpus_per_learner}

    def bundle(resources: dict[str, Any]) -> dict[str, float]:
        return {k: float(v) for k, v in resources.items() if isinstance(v, int | float) and v > 0}

    return {
        "rollout actors": [bundle(runner)] * config.num_env_runners,
        "learner": [bundle(learner)] * config.num_learners,
        "reward actors": [s.bundle for s in config.reward_specs.values() for _ in range(s.replicas)],
    }
