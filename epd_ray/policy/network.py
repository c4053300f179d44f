"""The policy network, which maps an interval's index to a change of the start table's parameters. It uses no Ray."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from epd_ray.policy.dirichlet import TableSpace, bound_concentration
from epd_ray.types import FloatArray


@dataclass(frozen=True)
class PolicySpec:
    """The policy network's shape and start.

    Attributes:
        space: which numbers of a table are drawn.
        base: [N][W] parameters of the start table, see `dirichlet.base_parameters`.
        max_concentration: bound on the total concentration of each Dirichlet.
        width: width of the hidden layers.
        depth: number of residual layers.
        seed: seed of the initial weights.
    """

    space: TableSpace
    base: tuple[tuple[float, ...], ...]
    max_concentration: float
    width: int
    depth: int
    seed: int = 0


class _Linear(nn.Linear):
    """A linear layer that is not initialised: nn.Linear would draw from the global random state."""

    def reset_parameters(self) -> None:
        """Do nothing; the owner of the layer initialises it with a generator of its own."""


class PolicyNetwork(nn.Module):
    """Interval index -> embedding -> residual MLP -> output, which is zero at first: the policy starts as `base`."""

    base: Tensor
    units: Tensor

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("base", torch.tensor(spec.base, dtype=torch.float32))  # [N, W]
        self.register_buffer("units", spec.space.residual_units, persistent=False)  # [W]
        generator = Generator().manual_seed(spec.seed)
        embedded = torch.randn(len(spec.base), spec.width, generator=generator)
        self.embedding = nn.Embedding.from_pretrained(embedded, freeze=False)
        linears = [_Linear(spec.width, spec.width) for _ in range(spec.depth)]
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(spec.width), nn.SiLU(), linear) for linear in linears)
        self.out = _Linear(spec.width, self.base.shape[1])
        bound = spec.width**-0.5  # the same as in nn.Linear
        for linear in linears:
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self) -> Tensor:
        """Parameters [N, W] of the table distribution, with bounded concentrations."""
        hidden = self.embedding.weight
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        residual: Tensor = self.out(hidden) * self.units
        return bound_concentration(self.base + residual, self.spec.space, self.spec.max_concentration)

    @torch.no_grad()
    def parameters_array(self) -> FloatArray:
        """The result of `forward()` as a numpy array, for the rollout jobs."""
        return np.array(self().numpy(), np.float32)
