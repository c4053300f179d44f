"""The distribution over solver tables: Dirichlet segments and weights per interval, log-normal scales on request.

Per interval, S = K + 1 segments g ~ Dirichlet(alpha_g) give the positions r = cumsum(g)[:K], and w ~ Dirichlet(alpha_w)
in R^K the weights; with a start point r_1 = 0 and S = K. The policy is a row of parameters per interval, in this order:
S log-concentrations of the segments, K of the weights, then for each trained scale (direction, time) K logarithms of
its mean and K log standard deviations of its logarithm. An action has the same order without the standard deviations.

The reference's parameter of a scale is the mean of the logarithm, m, instead of the logarithm of the mean,
m + std^2 / 2. There the deployed scale, the mean, starts exp(std^2 / 2) above the table of stage 1 and rises whenever
std does, though nothing was learned about the scale. Here it starts as that table, and std changes the spread alone.
Densities, entropy and KL of a given m and std are the reference's.
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
SMALLEST_PART = 1e-6  # of a simplex draw: the log-density has no value at 0
SMALLEST_BASE = 1e-3  # of a base table's segment or weight: a zero has no concentration


@dataclass(frozen=True)
class TableSpace:
    """Which numbers of a table are drawn.

    Attributes:
        points: K.
        scale_dir: whether direction scales are drawn too.
        scale_time: whether time scales are drawn too.
        start_point: whether the first point stays at the interval's start (see SolverTable).
    """

    points: int
    scale_dir: bool = False
    scale_time: bool = False
    start_point: bool = False

    @property
    def segments(self) -> int:
        """S, between the points that move and the interval's ends."""
        return self.points + 1 - int(self.start_point)

    @property
    def scales(self) -> int:
        return int(self.scale_dir) + int(self.scale_time)

    @property
    def parameter_width(self) -> int:
        """S + K, and 2K more per trained scale."""
        return self.segments + self.points + 2 * self.points * self.scales

    @property
    def action_width(self) -> int:
        """S + K, and K more per trained scale."""
        return self.segments + self.points + self.points * self.scales

    @property
    def residual_units(self) -> Tensor:
        """What a policy's output of 1 adds to each parameter, [W].

        1, but the first standard deviation for the logarithms of the means of scales. In units of 1 the steps that suit
        concentrations would take those means several standard deviations away at once, where nothing was drawn.
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
        """The table of an action [..., N, A]."""
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
        space: what is drawn.
        parameters: [..., N, W].
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
        """[..., N]."""
        total: Tensor = self.segments.entropy() + self.weights.entropy()
        for distribution in self.scales:
            total = total + distribution.entropy().sum(-1)
        return total

    def kl_per_interval(self, other: "TableDistribution") -> Tensor:
        """KL(self || other), [..., N]."""
        total: Tensor = kl_divergence(self.segments, other.segments) + kl_divergence(self.weights, other.weights)
        for mine, theirs in zip(self.scales, other.scales, strict=True):
            total = total + kl_divergence(mine, theirs).sum(-1)
        return total

    def mean_action(self) -> Tensor:
        """The mean of every part, [..., N, A]: what is deployed."""
        return torch.cat([self.segments.mean, self.weights.mean, *(s.mean for s in self.scales)], dim=-1)

    def mean_table(self) -> SolverTable:
        """The deployed solver's table."""
        return self.space.table(self.mean_action())

    def draw(self, seed: int) -> FloatArray:
        """One action [N, A], a function of the parameters [N, W] and the seed alone, on any machine."""
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
    """With the mean exp(log_mean), whatever the standard deviation `std` of the logarithm."""
    return LogNormal(log_mean - std**2 / 2, std)


def _inside_simplex(parts: Tensor) -> Tensor:
    parts = parts.clamp_min(SMALLEST_PART)
    return parts / parts.sum(-1, keepdim=True)


def base_parameters(table: SolverTable, space: TableSpace, concentration: float) -> Tensor:
    """Parameters [N, W] whose mean is the table, scales too: the policy starts as the stage 1 solver.

    Args:
        table: one table [N, K]; segments and weights of at least 0.001.
        space: what is drawn.
        concentration: c0, the total concentration of each simplex per interval (10 to 30 in practice).

    Raises:
        TableError: a per-sample table, another K, or an entry too small to be a mean.
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
                "to draw around it (distil a table, or move the point)"
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

    A log-normal scale has no upper end, but the model has never seen a sigma above its first. Apply this wherever a
    drawn or mean table meets a backbone. The action and its log-density stay as drawn: the clamp belongs to what an
    action does, so the policy gradient is unchanged.

    Args:
        table: [N, K] or [B, N, K].
        sigmas: [N+1], decreasing, > 0.
        form: of the ODE; nothing is clamped in "ve".
    """
    grid = sigmas.double()[:, None]
    largest = largest_sigma(form, grid[0])
    if largest is None or table.scale_time is None:
        return table
    inner = inner_sigma(grid[:-1], grid[1:], table.positions.double())
    return replace(table, scale_time=bounded_time_scale(table.scale_time, inner, largest))


def bound_concentration(parameters: Tensor, space: TableSpace, bound: float) -> Tensor:
    """Scale each simplex's concentrations down to a total of at most `bound`; the means stay.

    Without a bound exploration collapses: the policy sharpens until only noise is left to normalise.
    """
    simplices = [space.segments, space.points]
    parts = list(parameters.split([*simplices, parameters.shape[-1] - sum(simplices)], dim=-1))
    for i in (0, 1):
        excess = (parts[i].logsumexp(-1, keepdim=True) - math.log(bound)).clamp_min(0)
        parts[i] = parts[i] - excess
    return torch.cat(parts, dim=-1)
