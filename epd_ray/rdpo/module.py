"""The policy network as a module of RLlib, and the distribution of tables as an action distribution of RLlib."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core import Columns
from ray.rllib.core.distribution.distribution import Distribution
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from epd_ray.policy.dirichlet import TableDistribution, TableSpace
from epd_ray.policy.network import PolicyNetwork, PolicySpec


class TableActions(Distribution):  # type: ignore[misc]
    """TableDistribution as an action distribution of RLlib; get_partial_dist_cls binds `space`."""

    def __init__(self, parameters: Tensor, space: TableSpace) -> None:
        super().__init__()
        self.table = TableDistribution(space, parameters)

    @classmethod
    def from_logits(cls, logits: Tensor, *, space: TableSpace) -> "TableActions":
        return cls(logits, space)

    @staticmethod
    def required_input_dim(space: gym.Space[Any], **kwargs: Any) -> int:
        return int(np.prod(space.shape or ()))

    def sample(self, *, sample_shape: Any = None, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape=sample_shape)

    def rsample(self, *, sample_shape: Any = None, **kwargs: Any) -> Tensor:
        shape = sample_shape or torch.Size()
        parts = (self.table.segments, self.table.weights, *self.table.scales)
        return torch.cat([part.rsample(shape) for part in parts], dim=-1)

    def logp(self, value: Tensor, **kwargs: Any) -> Tensor:
        return self.table.log_prob(value)

    def entropy(self, **kwargs: Any) -> Tensor:
        return self.table.entropy_per_interval().sum(-1)

    def kl(self, other: Distribution, **kwargs: Any) -> Tensor:
        assert isinstance(other, TableActions)
        return self.table.kl_per_interval(other.table).sum(-1)


class SolverTableModule(TorchRLModule):  # type: ignore[misc]
    """PolicyNetwork as a module of RLlib. `model_config["policy"]` is its PolicySpec; observations are ignored."""

    def setup(self) -> None:
        spec: PolicySpec = self.model_config["policy"]
        self.policy = PolicyNetwork(spec)
        self.action_dist_cls = TableActions.get_partial_dist_cls(space=spec.space)

    def _forward(self, batch: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.policy().expand(len(batch[Columns.OBS]), -1, -1)}
