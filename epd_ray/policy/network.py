"""The policy as an RLlib module: interval index -> residual on the base table's log-concentrations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core import Columns
from ray.rllib.core.distribution.distribution import Distribution
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from epd_ray.policy.dirichlet import TableDistribution, TableSpace, bound_concentration
from epd_ray.types import FloatArray


@dataclass(frozen=True)
class PolicySpec:
    """The policy network's shape and start.

    Attributes:
        space: what is drawn.
        base: [N][W] parameters of the start (see dirichlet.base_parameters).
        max_concentration: bound on each simplex's total concentration.
        width: of the hidden layers.
        depth: number of residual layers.
        seed: of the initial weights.
    """

    space: TableSpace
    base: tuple[tuple[float, ...], ...]
    max_concentration: float
    width: int = 128
    depth: int = 2
    seed: int = 0


class PolicyNetwork(nn.Module):
    """Interval index -> embedding -> residual MLP -> zero-initialised output: it starts as the base table."""

    base: Tensor
    units: Tensor

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("base", torch.tensor(spec.base, dtype=torch.float32))  # [N, W]
        self.register_buffer("units", spec.space.residual_units, persistent=False)  # [W]
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            self.embedding = nn.Embedding(len(spec.base), spec.width)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(spec.width), nn.SiLU(), nn.Linear(spec.width, spec.width))
                for _ in range(spec.depth)
            )
            self.out = nn.Linear(spec.width, self.base.shape[1])
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self) -> Tensor:
        """Parameters [N, W] of the table distribution, their concentrations bounded."""
        hidden = self.embedding.weight
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        residual: Tensor = self.out(hidden) * self.units
        return bound_concentration(self.base + residual, self.spec.space, self.spec.max_concentration)

    @torch.no_grad()
    def parameters_array(self) -> FloatArray:
        """`forward()` as numpy, for the rollout jobs."""
        return np.array(self().numpy(), np.float32)


class TableActions(Distribution):  # type: ignore[misc]
    """RLlib's view of TableDistribution; `space` is bound by get_partial_dist_cls."""

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
    """RLModule around PolicyNetwork; `model_config["policy"]` is a PolicySpec. Observations are ignored."""

    def setup(self) -> None:
        spec: PolicySpec = self.model_config["policy"]
        self.policy = PolicyNetwork(spec)
        self.action_dist_cls = TableActions.get_partial_dist_cls(space=spec.space)

    def _forward(self, batch: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.policy().expand(len(batch[Columns.OBS]), -1, -1)}
