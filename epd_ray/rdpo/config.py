"""RDPOConfig: the settings of RDPO, in addition to those that RLlib has for every algorithm."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from epd_ray.actors.encoder import EncoderSpec
from epd_ray.actors.reward_pool import RewardSpec
from epd_ray.actors.tasks import BackboneSpec, WorkerSpec
from epd_ray.config.sections import RDPOSection, SolverConfig
from epd_ray.config.services import ClusterConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.errors import ConfigError, shown
from epd_ray.policy.dirichlet import TableSpace, base_parameters
from epd_ray.policy.minibatches import minibatch_problem
from epd_ray.policy.network import PolicySpec
from epd_ray.prompts.panel import Panel
from epd_ray.randomness import Purpose, plain_seed
from epd_ray.rdpo.batch import Baseline, BatchPlan, UpdatePlan
from epd_ray.rdpo.learner import RDPOLearner
from epd_ray.rdpo.learner_group import SoleLearnerGroup
from epd_ray.rdpo.module import SolverTableModule
from epd_ray.rdpo.runner import SolverEnvRunner
from epd_ray.rdpo.settings import refused
from epd_ray.rewards.mixing import Mixer, Mode
from epd_ray.rewards.routes import Routes
from epd_ray.solvers.table import SolverTable, uniform_table
from epd_ray.types import Metadata

EMBEDDED_BACKBONE = BackboneSpec(options={"model": "shapes", "max_sequence_length": 20}, guidance_scale=7.0)
EMBEDDED_REWARDS = {"clip": RewardSpec(options={"model": "shapes-clip"})}


class RDPOConfig(AlgorithmConfig):  # type: ignore[misc]
    """Configures RDPO. The defaults fine-tune a solver of the embedded model.

    Example:
        >>> algo = RDPOConfig().policy(concentration=20).rollouts(group_size=8).build_algo()
        >>> algo.train()
        >>> algo.mean_table()

    Attributes:
        builds: the algorithm class that `build_algo` builds. epd_ray.rdpo sets it, because the module of the algorithm
            imports this module.
    """

    builds: ClassVar[type[Algorithm] | None] = None

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or self.builds)
        self.env_runner_cls = SolverEnvRunner
        self.num_env_runners, self.max_env_runners = 2, 0
        self.num_learners = 1
        self.merge_env_runner_states = self.broadcast_env_runner_states = False
        self.restart_failed_env_runners = True
        self.delay_between_env_runner_restarts_s = 1.0
        self.env_runner_health_probe_timeout_s = 5.0
        self.enable_env_runner_and_connector_v2 = self.enable_rl_module_and_learner = True
        self.num_cpus_per_env_runner, self.num_cpus_for_main_process = 0.75, 0
        self.num_cpus_per_learner: float | str = 0.25
        rdpo, solver, cluster = RDPOSection(), SolverConfig(), ClusterConfig()  # the only place of the defaults
        self.lr, self.grad_clip, self.num_epochs, self.minibatch_size = (
            rdpo.lr,
            rdpo.grad_clip,
            rdpo.num_epochs,
            rdpo.minibatch_size,
        )
        self.shuffle_batch_per_epoch = True
        self.clip, self.weight_decay = rdpo.clip, rdpo.weight_decay
        self.kl_coeff, self.entropy_coeff = rdpo.kl_coeff, rdpo.entropy_coeff
        self.table: SolverTable = uniform_table(solver.intervals, solver.points, solver.start_point)
        self.concentration, self.concentration_bound = rdpo.concentration, rdpo.concentration_bound
        self.scale_dir, self.scale_time = rdpo.scale_dir, rdpo.scale_time
        self.afs, self.order = solver.afs, solver.order
        self.grid, self.history, self.guidance = solver.grid, solver.history, solver.guidance
        self.reuse: tuple[bool, ...] = solver.reused
        self.hidden_width, self.hidden_depth = rdpo.hidden_width, rdpo.hidden_depth
        self.backbone_spec = EMBEDDED_BACKBONE
        self.encoder_spec: EncoderSpec | None = None
        self.placement_timeout_s, self.task_timeout_s = cluster.placement_timeout_s, cluster.task_timeout_s
        self.prompts: tuple[str, ...] = ()
        self.held_out: tuple[str, ...] = ()
        self.prompts_per_iteration, self.group_size = rdpo.prompts_per_iteration, rdpo.group_size
        self.images_per_job = cluster.images_per_job
        self.same_latent, self.baseline, self.staleness = rdpo.same_latent, rdpo.baseline, rdpo.staleness
        self.keep_images = False
        self.reward_specs: dict[str, RewardSpec] = dict(EMBEDDED_REWARDS)
        self.normalisation: Mode = rdpo.normalisation
        self.rows: dict[str, Metadata] = {}
        self.heads_column: str | None = None

    def solver(
        self,
        *,
        table: SolverTable | None = NotProvided,
        scale_dir: bool = NotProvided,
        scale_time: bool = NotProvided,
        afs: bool = NotProvided,
        order: int = NotProvided,
        grid: bool = NotProvided,
        history: int = NotProvided,
        guidance: bool = NotProvided,
        reuse: tuple[bool, ...] = NotProvided,
    ) -> "RDPOConfig":
        """Set the solver to start from and what of it is learned.

        Args:
            table: the solver table, [N, K], which is the mean of the policy at the start.
            scale_dir: whether the policy also draws a direction scale for each point.
            scale_time: whether the policy also draws a time scale for each point.
            afs: whether the first step is analytical, which saves an evaluation.
            order: the order of the multistep slope from an interval's start to its points, 1 to 4.
            grid: whether the policy also draws the intervals' shares of the schedule.
            history: H, the number of earlier drifts whose weights the policy also draws, 0 to 3.
            guidance: whether the policy also draws each interval's guidance scale.
            reuse: [N], whether an interval takes the difference that the prompt makes from an earlier one; () for none.
        """
        return self._assign(locals())

    def policy(
        self,
        *,
        concentration: float = NotProvided,
        concentration_bound: float = NotProvided,
        hidden_width: int = NotProvided,
        hidden_depth: int = NotProvided,
    ) -> "RDPOConfig":
        """Set the policy around the table.

        Args:
            concentration: c0, the total concentration of each Dirichlet distribution at the start, > 0.
            concentration_bound: the largest total concentration, as a multiple of c0, >= 1.
            hidden_width: the width of the residual layers of the policy network.
            hidden_depth: the number of its residual layers.
        """
        return self._assign(locals())

    def backbone(
        self,
        *,
        family: str = NotProvided,
        options: Mapping[str, Any] = NotProvided,
        guidance_scale: float | None = NotProvided,
    ) -> "RDPOConfig":
        """Set the frozen model.

        Args:
            family: a name in the registry of backbones, or "module:Class".
            options: the keyword arguments of the constructor.
            guidance_scale: the guidance scale of every picture; None for the default of the model's family.
        """
        given: dict[str, Any] = {"family": family, "options": options, "guidance_scale": guidance_scale}
        chosen = {k: v for k, v in given.items() if v is not NotProvided}
        self.backbone_spec = replace(self.backbone_spec, **chosen)
        return self

    def actors(
        self,
        *,
        encoder_spec: EncoderSpec | None = NotProvided,
        max_env_runners: int = NotProvided,
        placement_timeout_s: float = NotProvided,
        task_timeout_s: float | None = NotProvided,
    ) -> "RDPOConfig":
        """Set the actors beside RLlib's own settings of them.

        Args:
            encoder_spec: the actor that holds the text encoders for all rollout actors; with None each loads its own.
            max_env_runners: the largest number of rollout actors while nodes join; 0 for as many as at the start.
            placement_timeout_s: seconds that actors may wait for room; an autoscaler that adds nodes needs more than
                the default.
            task_timeout_s: seconds without an answer after which an actor is replaced. The first answer of a process
                may take four times as long, because it loads a model. None sets no bound.
        """
        return self._assign(locals())

    def rollouts(  # type: ignore[override]
        self,
        *,
        prompts: Sequence[str] = NotProvided,
        held_out: Sequence[str] = NotProvided,
        prompts_per_iteration: int = NotProvided,
        group_size: int = NotProvided,
        images_per_job: int = NotProvided,
        same_latent: bool = NotProvided,
        baseline: Baseline = NotProvided,
        staleness: int = NotProvided,
        keep_images: bool = NotProvided,
    ) -> "RDPOConfig":
        """Set what an iteration draws.

        Args:
            prompts: the prompts to train on; where there are none, the embedded scenes.
            held_out: the prompts of RDPO.evaluate, from which nothing is learned; where there are no prompts of either
                kind, other embedded scenes.
            prompts_per_iteration: P, the number of prompts per iteration.
            group_size: G, the number of images per prompt, >= 2.
            images_per_job: the number of images in one call of a rollout actor, >= 1.
            same_latent: whether the images of a group share their noise.
            baseline: the baseline of the advantages: "per_prompt", or "mixed", which the reference uses.
            staleness: how many updates old the policy of a rollout may be, >= 0; 0 is fully synchronous.
            keep_images: whether the images come to the driver, into the rollouts of `RDPO.last`.
        """
        given = dict(locals())
        given |= {k: tuple(given[k]) for k in ("prompts", "held_out") if given[k] is not NotProvided}
        return self._assign(given)

    def rewards(
        self,
        heads: Mapping[str, RewardSpec],
        *,
        normalisation: Mode = NotProvided,
        rows: Mapping[str, Metadata] = NotProvided,
        heads_column: str | None = NotProvided,
    ) -> "RDPOConfig":
        """Set the reward heads, and what they know of each prompt.

        Args:
            heads: the name of each head -> its actors.
            normalisation: how raw scores are normalised, see Mixer.
            rows: prompt -> the columns of its row, for heads that read some.
            heads_column: the column that names the heads which judge a prompt, see Panel; None lets all judge all.
        """
        self.reward_specs = dict(heads)
        given = {"normalisation": normalisation, "heads_column": heads_column}
        return self._assign({**given, "rows": rows if rows is NotProvided else dict(rows)})

    def training(  # type: ignore[override]
        self,
        *,
        clip: float = NotProvided,
        kl_coeff: float = NotProvided,
        entropy_coeff: float = NotProvided,
        weight_decay: float = NotProvided,
        **rllib: Any,
    ) -> "RDPOConfig":
        """Set the update of the policy.

        Args:
            clip: PPO clips the probability ratio to 1 - clip and 1 + clip.
            kl_coeff: the weight of the KL divergence from the policy to the one at the start.
            entropy_coeff: the weight of the policy's entropy.
            weight_decay: the weight decay of AdamW.
            **rllib: settings of RLlib, such as lr and num_epochs.
        """
        super().training(**rllib)
        given = locals()
        names = ("clip", "kl_coeff", "entropy_coeff", "weight_decay")
        return self._assign({name: given[name] for name in names})

    def _assign(self, given: dict[str, Any]) -> "RDPOConfig":
        for name, value in given.items():
            if value is not NotProvided and name not in ("self", "__class__"):
                setattr(self, name, value)
        return self

    @property
    def space(self) -> TableSpace:
        """The space of the tables that the policy draws."""
        return TableSpace(
            self.table.points,
            self.scale_dir,
            self.scale_time,
            self.table.start_point,
            self.grid,
            self.history,
            self.guidance,
            self.reuse,
        )

    def mixer(self) -> Mixer:
        """A new Mixer of the reward heads."""
        weights = {name: spec.weight for name, spec in self.reward_specs.items()}
        kinds = {name: spec.head for name, spec in self.reward_specs.items()}
        return Mixer(weights, kinds, self.normalisation, self.routes if self.heads_column is not None else None)

    @property
    def routes(self) -> Routes:
        """Which heads judge each prompt, and the columns of its row that they read."""
        specs = self.reward_specs
        weights, needs = {n: s.weight for n, s in specs.items()}, {n: s.needs for n, s in specs.items()}
        return Routes(Panel(weights, needs, self.heads_column), self.rows)

    def _require_rows(self) -> None:
        """Refuse prompts that a head cannot judge.

        Raises:
            PromptError: a row lacks a column.
        """
        panel = self.routes.panel
        for prompt in (*self.prompts, *self.held_out) if panel.columns else ():
            panel.require(self.rows.get(prompt, {}), f"the prompt {shown(prompt)}")

    @property
    def batch_plan(self) -> BatchPlan:
        """The settings that determine the requests of every iteration."""
        return BatchPlan(
            seed=self.seed or 0,
            prompts_per_iteration=self.prompts_per_iteration,
            group_size=self.group_size,
            images_per_job=self.images_per_job,
            same_latent=self.same_latent,
            baseline=self.baseline,
        )

    @property
    def update_plan(self) -> UpdatePlan:
        """The epochs and minibatches in which the learner goes through the images of an iteration."""
        return UpdatePlan(self.seed or 0, self.num_epochs, self.minibatch_size, self.shuffle_batch_per_epoch)

    @property
    def worker_spec(self) -> WorkerSpec:
        """The backbone and the sampler that each rollout actor builds."""
        sampler = Sampler("epd", self.table.intervals, "policy", "policy", None, self.afs, self.order)
        return WorkerSpec(self.backbone_spec, self.space, sampler)

    @property
    def policy_spec(self) -> PolicySpec:
        """The policy network that the learner builds."""
        base = base_parameters(self.table, self.space, self.concentration, self.backbone_spec.guidance_scale)
        bound = self.concentration * self.concentration_bound
        rows = tuple(tuple(row) for row in base.tolist())
        weights = plain_seed(Purpose.POLICY_WEIGHTS, self.seed or 0)
        return PolicySpec(self.space, rows, bound, self.hidden_width, self.hidden_depth, weights)

    def get_default_learner_class(self) -> type[RDPOLearner]:
        return RDPOLearner

    def build_learner_group(
        self, *, env: Any = None, spaces: Any = None, rl_module_spec: Any = None, placement_group: Any = None
    ) -> SoleLearnerGroup:
        """RLlib's learner group of at most one learner (see SoleLearnerGroup); the arguments are those of RLlib."""
        spec = rl_module_spec or self.get_multi_rl_module_spec(env=env, spaces=spaces)
        return SoleLearnerGroup(config=self.copy(), module_spec=spec, placement_group=placement_group)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=SolverTableModule, model_config={"policy": self.policy_spec})

    def _spaces(self) -> tuple[gym.spaces.Box, gym.spaces.Box]:
        """The spaces of observations, which are empty of meaning, and of tables."""
        shape = (self.table.intervals, self.space.action_width)
        least = -np.inf if self.history else 0.0
        return gym.spaces.Box(0, 1, (1,), np.float32), gym.spaces.Box(least, np.inf, shape, np.float32)

    def _refuse_others(self) -> None:
        """Refuse what the user has set and RDPO would not obey.

        Raises:
            ConfigError: there is such a setting or callback.
        """
        expected = type(self)()
        for name, space in zip(("observation_space", "action_space"), self._spaces(), strict=True):
            if getattr(self, name) is not None:  # validate() sets them
                setattr(expected, name, space)
        if problems := refused(self, expected):
            raise ConfigError(problems)

    def validate(self) -> None:
        """Check the settings and derive others.

        Raises:
            ConfigError: a setting of RLlib was changed that RDPO does not obey.
            ValueError: a value is out of bounds.
        """
        if not self.in_evaluation:  # RLlib changes some in its copy for evaluations
            self._refuse_others()
        if self.num_cpus_per_learner == "auto":  # as RLlib counts
            self.num_cpus_per_learner = 0 if self.num_gpus_per_learner else 1
        self.create_local_env_runner = self.num_env_runners == 0  # with rollout actors the driver needs no backbone
        self.observation_space, self.action_space = self._spaces()
        super().validate()
        self._require_rows()
        if self.group_size < 2:
            self._value_error(
                f"group_size is {self.group_size}: the leave-one-out baseline needs at least 2 images per prompt"
            )
        if problem := minibatch_problem(self.minibatch_size, self.batch_plan.images):
            self._value_error(f"minibatch_size {problem}")
        if self.staleness < 0 or self.images_per_job < 1:
            self._value_error("staleness must be at least 0 and images_per_job at least 1")
        if self.concentration_bound < 1:
            self._value_error(
                f"concentration_bound is {self.concentration_bound}, at least 1 (a multiple of the start) is needed"
            )
        if self.num_learners > 1:
            self._value_error(
                f"num_learners is {self.num_learners}: use 0 or 1, because the policy has only a few kilobytes"
            )
        for name, spec in self.reward_specs.items():
            if spec.replicas < 1 and (spec.replicas < 0 or spec.python is not None or spec.max_replicas):
                self._value_error(
                    f"rewards() has replicas {spec.replicas} for {shown(name)}: it must be at least 1, or "
                    "0 (in the driver) "
                    "without python and max_replicas"
                )
        if self.encoder_spec is not None and self.backbone_spec.family != "auto":
            self._value_error(
                f"actors(encoder_spec=...) needs the backbone family 'auto', not {shown(self.backbone_spec.family)}"
            )


def placement(config: RDPOConfig) -> dict[str, list[dict[str, float]]]:
    """Every kind of actor -> the resources that each of its actors asks for."""
    runner = {"CPU": config.num_cpus_per_env_runner, "GPU": config.num_gpus_per_env_runner}
    runner |= config.custom_resources_per_env_runner
    learner = {"CPU": config.num_cpus_per_learner, "GPU": config.num_gpus_per_learner}
    learner |= config.custom_resources_per_learner

    def bundle(resources: dict[str, Any]) -> dict[str, float]:
        return {k: float(v) for k, v in resources.items() if isinstance(v, int | float) and v > 0}

    return {
        "rollout actors": [bundle(runner)] * config.num_env_runners,
        "learner": [bundle(learner)] * config.num_learners,
        "encoder actor": [] if config.encoder_spec is None else [config.encoder_spec.bundle],
        "reward actors": [s.bundle for s in config.reward_specs.values() for _ in range(s.replicas)],
    }
