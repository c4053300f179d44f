"""The distribution over solver tables: in each interval Dirichlet segments and weights, and optional log-normal scales.

Per interval, S = K + 1 segments g ~ Dirichlet(alpha_g) give the positions r = cumsum(g)[:K], and w ~ Dirichlet(alpha_w)
in R^K the weights; with a start point r_1 = 0 and S = K. The policy has one row of parameters per interval, in this
order: S log-concentrations of the segments, K log-concentrations of the weights, then for each trained scale
(direction, time) K logarithms of its mean and K logarithms of the standard deviation of its logarithm. An action has
the same order without the standard deviations.

The EPD authors' code takes the mean of the scale's logarithm, m, as the parameter, instead of the logarithm of the
mean, m + std^2 / 2. There the deployed scale, which is the mean, starts at exp(std^2 / 2) times the scale of stage 1,
and grows with std although nothing was learned about the scale. Here it starts at the scale of stage 1, and std only
changes the spread. For a given m and std, the density, entropy and KL divergence are the same as there.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Dirichlet, LogNormal, kl_divergence

from epd_ray.errors import TableError
from epd_ray.randomness import Purpose, stream
from epd_ray.solvers import SolverTable
from epd_ray.solvers.interval import bounded_time_scale, inner_sigma, largest_sigma
from epd_ray.types import FloatArray, Form

INITIAL_LOG_STD = -3.0
LOG_STD_RANGE = (-7.0, 2.0)
SMALLEST_PART = 1e-6  # of a segment or weight that was drawn: the log-density is infinite at 0
SMALLEST_BASE = 1e-3  # of a segment or weight of the start table: its concentration must be above 0


@dataclass(frozen=True)
class TableSpace:
    """Which numbers of a table are drawn.

    Attributes:
        points: K, the number of points per interval.
        scale_dir: whether direction scales are drawn too.
        scale_time: whether time scales are drawn too.
        start_point: whether the first point of each interval stays at the interval's start.
    """

    points: int
    scale_dir: bool = False
    scale_time: bool = False
    start_point: bool = False

    @property
    def segments(self) -> int:
        """S, the number of segments between the points that move and the interval's ends."""
        return self.points + 1 - int(self.start_point)

    @property
    def scales(self) -> int:
        return int(self.scale_dir) + int(self.scale_time)

    @property
    def parameter_width(self) -> int:
        """W, the number of policy parameters per interval: S + K, and 2K more for each trained scale."""
        return self.segments + self.points + 2 * self.points * self.scales

    @property
    def action_width(self) -> int:
        """A, the number of values per interval in an action: S + K, and K more for each trained scale."""
        return self.segments + self.points + self.points * self.scales

    @property
    def residual_units(self) -> Tensor:
        """What an output of 1 of the policy network adds to each parameter, [W].

        It is 1, except for the logarithms of the scales' means, where it is their initial standard deviation. With 1, a
        step size that suits the concentrations would move those means several standard deviations at once, to where
        nothing was drawn.
        """
        k = self.points
        scale = [math.exp(INITIAL_LOG_STD)] * k + [1.0] * k
        return torch.tensor([1.0] * (self.segments + k) + scale * self.scales)

    def split_action(self, action: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Segments [..., S] and weights [..., K], renormalised inside their simplex, and the scales [..., K]."""
        k = self.points
        segments, weights, *scales = action.split([self.segments, k, *[k] * self.scales], dim=-1)
        return _inside_simplex(segments), _inside_simplex(weights), scales

    def table(self, action: Tensor) -> SolverTable:
        """The table [..., N, K] that an action [..., N, A] stands for."""
        segments, weights, scales = self.split_action(action)
        positions = segments.cumsum(-1)[..., :-1].clamp(max=1.0)
        if self.start_point:
            positions = torch.cat([torch.zeros_like(weights[..., :1]), positions], dim=-1)
        scale_dir = scales.pop(0) if self.scale_dir else None
        scale_time = scales.pop(0) if self.scale_time else None
        return SolverTable(positions, weights, scale_dir=scale_dir, scale_time=scale_time)


@dataclass(frozen=True)
class TableDistribution:
    """A policy's distribution over tables.

    Attributes:
        space: which numbers of a table are drawn.
        parameters: [..., N, W], in the order that the module's docstring gives.
    """

    space: TableSpace
    parameters: Tensor

    @property
    def segments(self) -> Dirichlet:
        return Dirichlet(self.parameters[..., : self.space.segments].exp())

    @property
    def weights(self) -> Dirichlet:
        first = self.space.segments
        return Dirichlet(self.parameters[..., first : first + self.space.points].exp())

    @property
    def scales(self) -> list[LogNormal]:
        k = self.space.points
        rest = self.parameters[..., self.space.segments + k :]
        pairs = [rest[..., i : i + 2 * k] for i in range(0, rest.shape[-1], 2 * k)]
        return [_log_normal(p[..., :k], p[..., k:].clamp(*LOG_STD_RANGE).exp()) for p in pairs]

    def log_prob_per_interval(self, action: Tensor) -> Tensor:
        """Log-density of actions [..., N, A]; returns [..., N]."""
        segments, weights, scales = self.space.split_action(action)
        total: Tensor = self.segments.log_prob(segments) + self.weights.log_prob(weights)
        for distribution, value in zip(self.scales, scales, strict=True):
            total = total + distribution.log_prob(value).sum(-1)
        return total

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density summed over intervals; [...]."""
        return self.log_prob_per_interval(action).sum(-1)

    def entropy_per_interval(self) -> Tensor:
        """Differential entropy of each interval, [..., N]."""
        total: Tensor = self.segments.entropy() + self.weights.entropy()
        for distribution in self.scales:
            total = total + distribution.entropy().sum(-1)
        return total

    def kl_per_interval(self, other: "TableDistribution") -> Tensor:
        """KL(self || other) of each interval, [..., N]."""
        total: Tensor = kl_divergence(self.segments, other.segments) + kl_divergence(self.weights, other.weights)
        for mine, theirs in zip(self.scales, other.scales, strict=True):
            total = total + kl_divergence(mine, theirs).sum(-1)
        return total

    def mean_action(self) -> Tensor:
        """The mean of the distribution as an action, [..., N, A]; the deployed solver uses it."""
        return torch.cat([self.segments.mean, self.weights.mean, *(s.mean for s in self.scales)], dim=-1)

    def mean_table(self) -> SolverTable:
        """The deployed solver's table."""
        return self.space.table(self.mean_action())

    def draw(self, seed: int) -> FloatArray:
        """One action [N, A], which depends on the parameters [N, W] and the seed alone, not on the machine."""
        rng = stream(Purpose.TABLE, seed)
        simplices = []
        for distribution in (self.segments, self.weights):
            gammas = rng.standard_gamma(distribution.concentration.double().numpy())
            parts = gammas / np.maximum(gammas.sum(-1, keepdims=True), 1e-300)
            parts = np.maximum(parts, SMALLEST_PART)
            simplices.append(parts / parts.sum(-1, keepdims=True))
        normals = [
            np.exp(s.loc.double().numpy() + s.scale.double().numpy() * rng.standard_normal(tuple(s.loc.shape)))
            for s in self.scales
        ]
        return np.concatenate([*simplices, *normals], axis=-1).astype(np.float32)


def _log_normal(log_mean: Tensor, std: Tensor) -> LogNormal:
    """A log-normal with mean exp(log_mean), whose logarithm has the standard deviation `std`."""
    return LogNormal(log_mean - std**2 / 2, std)


def _inside_simplex(parts: Tensor) -> Tensor:
    parts = parts.clamp_min(SMALLEST_PART)
    return parts / parts.sum(-1, keepdim=True)


def base_parameters(table: SolverTable, space: TableSpace, concentration: float) -> Tensor:
    """Parameters [N, W] of a distribution whose mean is a given table, so that the policy starts as that table.

    Args:
        table: one table [N, K], whose segments and weights are at least 0.001.
        space: which numbers of a table are drawn.
        concentration: total concentration of each Dirichlet, > 0 (10 to 30 in practice).

    Raises:
        TableError: one table per sample, another K, scales that are not drawn, or an entry too small to be a mean.
    """
    if table.batch is not None or table.points != space.points:
        raise TableError(f"base table has shape {tuple(table.positions.shape)}, expected [N, {space.points}]")
    positions, weights = table.positions.float(), table.weights.float()
    edges = torch.cat([torch.zeros_like(positions[:, :1]), positions, torch.ones_like(positions[:, :1])], dim=1)
    segments = edges.diff(dim=1)
    if space.start_point:
        if not table.start_point:
            raise TableError("the table's first points are not at the start of their intervals, as start_point says")
        segments = segments[:, 1:]
    for name, parts in (("segment", segments), ("weight", weights)):
        if float(parts.min()) < SMALLEST_BASE:
            row, column = divmod(int(parts.argmin()), parts.shape[1])
            raise TableError(
                f"{name}[{row}][{column}] is {float(parts.min()):.3g}, at least {SMALLEST_BASE} is needed "
                "to draw around it (distill a table, or move the point)"
            )
    parameters = [torch.log(concentration * segments), torch.log(concentration * weights)]
    scales = ((space.scale_dir, table.scale_dir), (space.scale_time, table.scale_time))
    for trained, scale in scales:
        if scale is not None and not trained:
            raise TableError("the start table has scales that would be lost: set rdpo.scale_dir and rdpo.scale_time")
        if trained:
            value = torch.ones_like(weights) if scale is None else scale.float()
            parameters += [value.log(), torch.full_like(weights, INITIAL_LOG_STD)]
    return torch.cat(parameters, dim=1)


def clamp_scale_time(table: SolverTable, sigmas: Tensor, form: Form) -> SolverTable:
    """For a flow model, lower each time scale until its point is evaluated at sigmas[0] at most.

    A log-normal scale has no upper bound, but the model knows no sigma above the first. Call this wherever a drawn
    table or the mean table is used with a backbone. The action and its log-density stay as drawn: the clamp is part of
    what the environment makes of an action, so the policy gradient is unchanged.

    Args:
        table: [N, K] or [B, N, K].
        sigmas: [N+1], decreasing, > 0.
        form: how noise enters x; in "ve" nothing is clamped.
    """
    grid = sigmas.double()[:, None]
    largest = largest_sigma(form, grid[0])
    if largest is None or table.scale_time is None:
        return table
    inner = inner_sigma(grid[:-1], grid[1:], table.positions.double())
    return replace(table, scale_time=bounded_time_scale(table.scale_time, inner, largest))


def bound_concentration(parameters: Tensor, space: TableSpace, bound: float) -> Tensor:
    """Scale the concentrations of each Dirichlet down to a total of at most `bound`, which keeps their means.

    Without a bound the policy becomes so narrow that the rewards of a group differ only by noise, which the advantages
    would then amplify.

    Args:
        parameters: [..., N, W].
        space: which numbers of a table are drawn.
        bound: largest total concentration, > 0.
    """
    simplices = [space.segments, space.points]
    parts = list(parameters.split([*simplices, parameters.shape[-1] - sum(simplices)], dim=-1))
    for i in (0, 1):
        excess = (parts[i].logsumexp(-1, keepdim=True) - math.log(bound)).clamp_min(0)
        parts[i] = parts[i] - excess
    return torch.cat(parts, dim=-1)
