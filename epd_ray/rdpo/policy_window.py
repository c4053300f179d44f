"""The policy at the driver: the newest one, and the earlier ones that rollouts may still be drawn with."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID

from epd_ray.policy.dirichlet import TableDistribution, base_parameters
from epd_ray.policy.network import PolicyNetwork, PolicySpec
from epd_ray.solvers import SolverTable
from epd_ray.types import FloatArray


class PolicyWindow:
    """The parameters of the last policies, by the number of updates behind each.

    The network that computes them is small and stays on the CPU of the driver; its weights come from the learner.

    Args:
        spec: shape of the policy network.
        staleness: the number of updates that the policy of a rollout may be old. One policy more is kept.
    """

    def __init__(self, spec: PolicySpec, staleness: int) -> None:
        self._spec, self._kept = spec, staleness + 1
        self._network = PolicyNetwork(spec)
        self._parameters: OrderedDict[int, FloatArray] = OrderedDict()

    @property
    def reuse(self) -> tuple[bool, ...]:
        """[N], whether an interval of every table reuses the prompt's difference; empty where none does."""
        return self._spec.space.reuse

    def take_reuse(self, reuse: tuple[bool, ...]) -> None:
        """Let other intervals reuse; the policy does not draw that, so its parameters stay as they are."""
        self._spec = replace(self._spec, space=replace(self._spec.space, reuse=reuse))

    @property
    def version(self) -> int:
        """The number of updates behind the newest policy."""
        return next(reversed(self._parameters))

    def take(self, version: int, learner_state: Mapping[str, Any]) -> None:
        """Make the learner's weights the newest policy.

        Args:
            version: the number of updates behind it.
            learner_state: the state of RLlib's learner group.
        """
        module = learner_state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        weights = {name.removeprefix("policy."): torch.as_tensor(np.array(value)) for name, value in module.items()}
        self._network.load_state_dict(weights)
        self._parameters[version] = self._network.parameters_array()
        while len(self._parameters) > self._kept:
            self._parameters.popitem(last=False)

    def parameters(self, version: int | None = None) -> FloatArray:
        """The parameters [N, W] of a policy, which rollout actors draw tables with; None stands for the newest."""
        return self._parameters[self.version if version is None else version]

    def distribution(self) -> TableDistribution:
        """The newest policy's distribution over tables."""
        return TableDistribution(self._spec.space, torch.from_numpy(self.parameters()))

    def base(self) -> TableDistribution:
        """The distribution over tables that training started from."""
        return TableDistribution(self._spec.space, self._network.base)

    def metrics(self) -> dict[str, float]:
        """How far the newest policy has moved from the base, and how widely it still explores."""
        policy = self.distribution()
        totals = torch.cat([d.concentration.sum(-1) for d in (policy.segments, policy.weights)])
        return {
            "policy/kl_to_base": float(policy.kl_per_interval(self.base()).sum()),
            "policy/entropy": float(policy.entropy_per_interval().sum()),
            "policy/concentration": float(totals.mean()),
        }

    def state(self) -> dict[int, FloatArray]:
        """The parameters by version, to go on exactly."""
        return dict(self._parameters)

    def restore(self, state: Mapping[Any, Any]) -> None:
        """Go on from `state`."""
        self._parameters = OrderedDict((int(v), np.asarray(p, np.float32)) for v, p in sorted(state.items()))


def rebased(learner_state: dict[str, Any], table: SolverTable, spec: PolicySpec, concentration: float) -> None:
    """Write another start table into the learner's state.

    Args:
        learner_state: the state of RLlib's learner group, changed in place.
        table: the table [N, K] that becomes the mean of the policy.
        spec: shape of the policy network.
        concentration: total Dirichlet concentration of each simplex at the start.
    """
    module = learner_state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
    module["policy.base"] = base_parameters(table, spec.space, concentration).numpy()
