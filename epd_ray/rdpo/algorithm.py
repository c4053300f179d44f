"""RDPO: residual Dirichlet policy optimisation of a solver table, as an RLlib Algorithm."""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
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
from epd_ray.actors.encoder import EncoderActor, start_encoder, wait_for_encoder
from epd_ray.actors.pipeline import Outcome, RolloutPipeline, runner_pool
from epd_ray.actors.reward_pool import ATTEMPTS, RewardPool
from epd_ray.actors.tasks import Method, Task, rollout_task, task_id
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.embedded.scenes import distinct_scenes
from epd_ray.errors import ConfigError, ModelError, is_own_bug
from epd_ray.policy.dirichlet import TableDistribution, base_parameters, clamp_scale_time
from epd_ray.policy.network import PolicyNetwork
from epd_ray.rdpo.batch import Row, join, learner_arguments, propose, summarise
from epd_ray.rdpo.config import RDPOConfig, placement
from epd_ray.solvers import SolverTable
from epd_ray.telemetry.memory import Memory
from epd_ray.types import FloatArray, RolloutJob, Sampled

RDPO_RESULTS = "rdpo"
EMBEDDED_PROMPTS = 256


@dataclass(frozen=True)
class Iteration:
    """What one training step did.

    Attributes:
        number: from 1.
        metrics: flat names (losses/policy_loss, reward/<head>, time/<phase>) to values.
        rows: one dict per rollout, ready for rollout_files.rollout_table.
    """

    number: int
    metrics: dict[str, float]
    rows: tuple[Row, ...]


class RDPO(Algorithm):  # type: ignore[misc]
    """Draws tables, makes pictures, scores them, updates the policy; the stages overlap by `max_staleness` iterations.

    Everything an iteration does follows from (seed, iteration, policy), so a retried or resumed one is the same.
    """

    config: RDPOConfig
    learner_group: LearnerGroup

    @classmethod
    def get_default_config(cls) -> RDPOConfig:
        return RDPOConfig()

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """RLlib's request plus our own actors: under Tune they must live in the trial's placement group."""
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
        own: RDPOConfig = self.config
        super().setup(config)
        self._prompts = own.prompts or tuple(s.caption for s in distinct_scenes("train", EMBEDDED_PROMPTS, 0, 0.5))
        self._rewards = RewardPool(own.reward_specs, tag, own.task_timeout_s)
        self._closing.callback(self._rewards.stop)
        self._pipeline = RolloutPipeline(
            runner_pool(self.env_runner_group, own.max_env_runners, own.task_timeout_s),
            self._rewards,
            self.env_runner_group.local_env_runner,
        )
        self._closing.callback(self._pipeline.stop)
        require_started({"rollout actors": self._pipeline.runners, "reward actors": self._rewards.actors})
        self._rewards.wait_ready()
        if self._encoder is not None:
            wait_for_encoder(self._encoder)
        self.facts: BackboneFacts = self._run([Task("describe", "describe", (own.table.intervals,))])[0].value
        self._mixer = own.mixer()
        self._iteration_done = self._submitted = 0
        self._training = False
        self._window: OrderedDict[int, FloatArray] = OrderedDict()
        self._ahead: dict[int, list[RolloutJob]] = {}  # submitted, not learned from yet
        self._sample_calls = self._work_calls = 0
        self._network = PolicyNetwork(own.policy_spec)  # on the CPU, for the parameters after each update
        self.last_iteration: int | None = None  # nothing is drawn beyond it
        self._remember(self._fetch_learner_state())

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
        self.config.backbone_spec = replace(model, encoder=name)
        self.config.freeze()

    def restore_env_runners(self, env_runner_group: EnvRunnerGroup) -> list[int]:
        """Nothing: the pipeline takes restarted actors back, and they hold no policy that would have to be sent."""
        return []

    def cleanup(self) -> None:
        self._closing.close()  # first: RLlib would wait for what its actors are at
        super().cleanup()

    def _run(self, tasks: Sequence[Task]) -> list[Outcome]:
        self._pipeline.submit(tasks)
        return self._pipeline.collect([t.task_id for t in tasks])

    # -- the policy at the driver -------------------------------------------------------------------------------------

    def _fetch_learner_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.learner_group.get_state(
            components=[f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", f"{COMPONENT_LEARNER}/{COMPONENT_OPTIMIZER}"]
        )
        return state

    def _give_learner_state(self) -> dict[str, Any]:
        self.learner_group.set_state(self._learner_state)
        return self._fetch_learner_state()

    def _remember(self, state: dict[str, Any]) -> None:
        """Keep the learner's small state: it feeds the rollouts, the checkpoints, and a learner that must be remade."""
        self._learner_state = state
        module = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        weights = {k.removeprefix("policy."): torch.as_tensor(np.array(v)) for k, v in module.items()}
        self._network.load_state_dict(weights)
        self._base = torch.as_tensor(np.array(module["policy.base"]))
        self._window[self._iteration_done] = self._network.parameters_array()
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
        self.drop_ahead()
        self._remember(self._of_learner(self._give_learner_state))

    # -- proposing ----------------------------------------------------------------------------------------------------

    def _jobs(self, iteration: int) -> list[RolloutJob]:
        version = max(0, iteration - self.config.max_staleness)
        parameters = self._window[version]
        requests = propose(self.config, self._prompts, iteration)
        return [RolloutJob((iteration, i), version, parameters, r) for i, r in enumerate(requests)]

    def _fill(self, needed: int = -1) -> None:
        """Submit iterations up to the staleness bound and before the last; the needed one in any case."""
        end = self._iteration_done + self.config.max_staleness
        if self.last_iteration is not None:
            end = min(end, self.last_iteration - 1)
        while self._submitted <= max(end, needed):
            jobs = self._ahead[self._submitted] = self._jobs(self._submitted)
            self._pipeline.submit(rollout_task(job, self.config.keep_images) for job in jobs)
            self._submitted += 1

    def drop_ahead(self) -> None:
        """Forget what is drawn for iterations to come: there will be none."""
        self._pipeline.discard()
        self._ahead.clear()
        self._submitted = self._iteration_done

    # -- one iteration ------------------------------------------------------------------------------------------------

    def training_step(self) -> None:
        """Collect one iteration's scored rollouts, learn from them, and keep the actors busy with the next."""
        if not self.config.reward_specs:
            raise ConfigError(["rewards() names no head: nothing to learn from (distilling and sampling work)"])
        if not self._training:
            self._training = True
            self._pipeline.take_metrics()  # waits of the start-up are none of an iteration's
        start = time.perf_counter()
        iteration = self._iteration_done
        self._fill(iteration)
        jobs = self._ahead[iteration]
        outcomes = self._pipeline.collect([task_id(job) for job in jobs])
        collected = time.perf_counter()
        self._mixer.observe([outcome.scores for outcome in outcomes])
        rows, advantages = join(jobs, outcomes, self._mixer.train)
        metrics = summarise(rows, advantages, outcomes)
        losses = self._learn(rows, jobs[0])
        learned = time.perf_counter()
        del self._ahead[iteration]
        self._fill()
        self._pipeline.poll(0.0)
        metrics |= losses | self._policy_metrics() | self._pipeline.take_metrics()
        metrics |= {
            "time/wait": collected - start,
            "time/learn": learned - collected,
            "time/iteration": time.perf_counter() - start,
            "staleness": float(iteration - jobs[0].policy_version),
        }
        self.last = Iteration(self._iteration_done, metrics, tuple(rows))
        self._log(metrics)

    def _learn(self, rows: Sequence[Row], job: RolloutJob) -> dict[str, float]:
        arguments = learner_arguments(self.config, rows, job)
        results, state = self._of_learner(lambda: self._update(arguments))
        self._iteration_done += 1
        self._remember(state)
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        names = ("policy_loss", "approx_kl", "clipfrac", "behaviour_kl", "learning_rate")
        return {f"losses/{n}": float(self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, n))) for n in names}

    def _of_learner(self, ask: Callable[[], Any]) -> Any:
        """What the learner answers; one that died over it is made again, with the state after the last update."""
        lost = None
        for _ in range(ATTEMPTS):
            try:
                if lost is not None:
                    self._remake_learner()
                answer = ask()
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, IndexError) as error:
                # IndexError is RLlib's, where its only learner is dead; from within the learner it is a task's error.
                if self.learner_group.is_local or isinstance(error, ray.exceptions.RayTaskError) or is_own_bug(error):
                    raise
                lost = lost or time.monotonic()
                self._pipeline.give_way()
            else:
                if lost is not None:
                    self._pipeline.recovered(time.monotonic() - lost)
                return answer
        raise ModelError(f"the learner: its process died {ATTEMPTS} times over the same update: out of memory?")

    def _update(self, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return self.learner_group.update(**arguments), self._fetch_learner_state()

    def _remake_learner(self) -> None:
        """A dead learner actor is replaced by one with the state after the last update."""
        self.learner_group.shutdown()
        self._require_room({"learner": placement(self.config)["learner"]})
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
            sampler: any solver; a table [B, N, K] gives each picture its own.
            prompts: B prompts.
            noise_seeds: B seeds.
            keep_images: bring the pictures to the driver.

        Returns:
            Scores by head; without heads none, and rewards that are not a number.
        """
        self._sample_calls += 1
        size = self.config.images_per_job
        tasks = []
        for i in range(0, len(prompts), size):
            part, seeds = tuple(prompts[i : i + size]), tuple(noise_seeds[i : i + size])
            ids = tuple(f"{sampler.key}:{j}" for j in range(i, i + len(part)))
            name = f"sample-{self._sample_calls}-{i}"
            asked = (sampler.rows(i, i + size), part, seeds)
            tasks.append(Task(name, "sample", asked, part, ids, bool(self.config.reward_specs), keep_images))
        outcomes = self._run(tasks)
        scores = {h: np.concatenate([o.scores[h] for o in outcomes]) for h in self.config.reward_specs}
        images = np.concatenate([o.images for o in outcomes if o.images is not None]) if keep_images else None
        reward = self._mixer.held_out(scores) if scores else np.full(len(prompts), np.nan, np.float32)
        return Sampled(scores, reward, images, sum(o.generate_seconds for o in outcomes))

    def stream(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """See RolloutPipeline.stream."""
        return self._pipeline.stream(tasks)

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the model reads."""
        count: int = self._run([Task("truncated", "truncated", (tuple(prompts),))])[0].value
        return count

    def work(self, method: Method, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a worker's method once per tuple, on whichever rollout actors are free; the answers in order."""
        self._work_calls += 1
        outcomes = self._run([Task(f"{method}-{self._work_calls}-{i}", method, a) for i, a in enumerate(arguments)])
        return [outcome.value for outcome in outcomes]

    def rehearse(self) -> list[Outcome]:
        """Generate and score two batches as training would, one after the other, and learn nothing.

        They are the first two jobs of the first iteration; an iteration of one job does it twice.
        """
        jobs = self._jobs(0)
        return [self._run([rollout_task(job)])[0] for job in (jobs[0], jobs[min(1, len(jobs) - 1)])]

    def memory(self) -> dict[str, Memory]:
        """Peaks of the actor of each kind that answered last; of the driver, where that makes the pictures."""
        if self._encoder is None:
            return self._pipeline.memory
        return self._pipeline.memory | {"encoder": ray.get(self._encoder.memory.remote())}

    # -- state --------------------------------------------------------------------------------------------------------

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        state[RDPO_RESULTS] = self._own_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if RDPO_RESULTS in state:
            self._take_over(state[RDPO_RESULTS], self._fetch_learner_state())

    def export_state(self) -> dict[str, Any]:
        """What a run needs to go on exactly: learner, optimiser, staleness window. Plain numbers and arrays."""
        return {RDPO_RESULTS: self._own_state(), COMPONENT_LEARNER: self._learner_state[COMPONENT_LEARNER]}

    def _own_state(self) -> dict[str, Any]:
        return {"iteration": self._iteration_done, "window": dict(self._window), "mixer": self._mixer.state()}

    def import_state(self, state: dict[str, Any]) -> None:
        """Go on from `export_state`."""
        self._learner_state = {COMPONENT_LEARNER: state[COMPONENT_LEARNER]}
        self._take_over(state[RDPO_RESULTS], self._of_learner(self._give_learner_state))

    def _take_over(self, own: dict[str, Any], learner: dict[str, Any]) -> None:
        self._pipeline.discard()
        self._ahead.clear()
        self._mixer.restore(own["mixer"])
        self._iteration_done = self._submitted = own["iteration"]
        self._window = OrderedDict((int(v), np.asarray(p, np.float32)) for v, p in sorted(own["window"].items()))
        self._remember(learner)

    def checksum(self) -> int:
        """CRC of the current parameters: equal for equal runs."""
        return zlib.crc32(self._window[self._iteration_done].tobytes())
