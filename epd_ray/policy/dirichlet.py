"""The distribution over solver tables: in each interval Dirichlet segments and weights, and optional log-normal scales.

Per interval, S = K + 1 segments g ~ Dirichlet(alpha_g) give the positions r = cumsum(g)[:K], and w ~ Dirichlet(alpha_w)
in R^K the weights; with a start point r_1 = 0 and S = K. The policy has one row of parameters per interval, in this
order: S log-concentrations of the segments, K log-concentrations of the weights, then for each trained scale
(direction, time) K logarithms of its mean and K logarithms of the standard deviation of its logarithm, then the further
parts. An action has the same order without the standard deviations.

Further parts are drawn where the space has them: the intervals' shares of the schedule, one Dirichlet over all N of
them, with a log-concentration in each interval's row; the history, H normal weights in each interval, with means and
logarithms of standard deviations; and the guidance scale of each interval, log-normal like the scales.

The EPD authors' code takes the mean of the scale's logarithm, m, as the parameter, instead of the logarithm of the
mean, m + std^2 / 2. There the deployed scale, which is the mean, starts at exp(std^2 / 2) times the scale of stage 1,
and grows with std although nothing was learned about the scale. Here it starts at the scale of stage 1, and std only
changes the spread. For a given m and std, the density, entropy and KL divergence are the same as there.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Dirichlet, LogNormal, Normal, kl_divergence

from epd_ray.errors import TableError
from epd_ray.randomness import Purpose, stream
from epd_ray.solvers import SolverTable
from epd_ray.solvers.grid import levels
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
        grid: whether the intervals' shares of the schedule are drawn.
        history: H, the number of earlier drifts whose weights are drawn; 0 draws none.
        guidance: whether each interval's guidance scale is drawn.
        reuse: [N], whether an interval reuses the difference that the prompt makes; it is part of every table, and not
            drawn. Empty: no interval does.
    """

    points: int
    scale_dir: bool = False
    scale_time: bool = False
    start_point: bool = False
    grid: bool = False
    history: int = 0
    guidance: bool = False
    reuse: tuple[bool, ...] = ()

    @property
    def segments(self) -> int:
        """S, the number of segments between the points that move and the interval's ends."""
        return self.points + 1 - int(self.start_point)

    @property
    def scales(self) -> int:
        return int(self.scale_dir) + int(self.scale_time)

    @property
    def parameter_width(self) -> int:
        """W, the number of policy parameters per interval: S + K, 2K for each trained scale, and the further parts."""
        return self.segments + self.points + 2 * self.points * self.scales + sum(self._further_parameters)

    @property
    def action_width(self) -> int:
        """A, the number of values per interval in an action: S + K, K for each trained scale, and the further parts."""
        return self.segments + self.points + self.points * self.scales + sum(self._further)

    @property
    def _further(self) -> tuple[int, int, int]:
        """The numbers of values per interval of grid, history and guidance."""
        return int(self.grid), self.history, int(self.guidance)

    @property
    def _further_parameters(self) -> tuple[int, int, int]:
        return int(self.grid), 2 * self.history, 2 * int(self.guidance)

    @property
    def residual_units(self) -> Tensor:
        """What an output of 1 of the policy network adds to each parameter, [W].

        It is 1, except for the means of the scales' logarithms and of the history, where it is their initial standard
        deviation. With 1, a step size that suits the concentrations would move those means several standard deviations
        at once, to where nothing was drawn.
        """
        k = self.points
        units = [1.0] * (self.segments + k)
        for count in [k] * self.scales:
            units += [math.exp(INITIAL_LOG_STD)] * count + [1.0] * count
        units += [1.0] * int(self.grid)
        for count in self._further[1:]:
            units += [math.exp(INITIAL_LOG_STD)] * count + [1.0] * count
        return torch.tensor(units)

    def split_parameters(self, parameters: Tensor) -> dict[str, Tensor]:
        """The parameters [..., N, W] by part: segments, weights, scales, grid, history, guidance."""
        parts = ("segments", "weights", "scales", "grid", "history", "guidance")
        widths = [self.segments, self.points, 2 * self.points * self.scales, *self._further_parameters]
        return dict(zip(parts, parameters.split(widths, dim=-1), strict=True))

    def split_action(self, action: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Segments [..., S] and weights [..., K], renormalised inside their simplex, and the scales [..., K]."""
        k = self.points
        parts = action.split([self.segments, k, *[k] * self.scales, sum(self._further)], dim=-1)
        segments, weights, *scales, _ = parts
        return _inside_simplex(segments), _inside_simplex(weights), scales

    def split_further(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The intervals' shares [..., N], renormalised; the history [..., N, H]; the guidance [..., N, 1].

        A part that is not drawn is empty.
        """
        grid, history, guidance = action[..., -sum(self._further) or action.shape[-1] :].split(self._further, dim=-1)
        return _inside_simplex(grid.squeeze(-1)) if self.grid else grid, history, guidance

    def table(self, action: Tensor) -> SolverTable:
        """The table [..., N, K] that an action [..., N, A] stands for."""
        segments, weights, scales = self.split_action(action)
        positions = segments.cumsum(-1)[..., :-1].clamp(max=1.0)
        if self.start_point:
            positions = torch.cat([torch.zeros_like(weights[..., :1]), positions], dim=-1)
        scale_dir = scales.pop(0) if self.scale_dir else None
        scale_time = scales.pop(0) if self.scale_time else None
        grid, history, guidance = self.split_further(action)
        return SolverTable(
            positions,
            weights,
            scale_dir=scale_dir,
            scale_time=scale_time,
            grid=grid if self.grid else None,
            history=_of_earlier(history) if self.history else None,
            guidance=guidance.squeeze(-1) if self.guidance else None,
            reuse=torch.tensor(self.reuse) if any(self.reuse) else None,
        )


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
        return Dirichlet(self._parts["segments"].exp())

    @property
    def weights(self) -> Dirichlet:
        return Dirichlet(self._parts["weights"].exp())

    @property
    def scales(self) -> list[LogNormal]:
        k = self.space.points
        rest = self._parts["scales"]
        pairs = [rest[..., i : i + 2 * k] for i in range(0, rest.shape[-1], 2 * k)]
        return [_log_normal(p[..., :k], p[..., k:].clamp(*LOG_STD_RANGE).exp()) for p in pairs]

    @property
    def grid(self) -> Dirichlet | None:
        """The intervals' shares, over all N of them; None where they are not drawn."""
        return Dirichlet(self._parts["grid"].squeeze(-1).exp()) if self.space.grid else None

    @property
    def history(self) -> Normal | None:
        """The weights of earlier drifts, [..., N, H], those without an earlier interval too; None: not drawn."""
        if not self.space.history:
            return None
        mean, log_std = self._parts["history"].chunk(2, -1)
        return Normal(mean, log_std.clamp(*LOG_STD_RANGE).exp())

    @property
    def guidance(self) -> LogNormal | None:
        """The guidance scales, [..., N, 1]; None where they are not drawn."""
        if not self.space.guidance:
            return None
        log_mean, log_std = self._parts["guidance"].chunk(2, -1)
        return _log_normal(log_mean, log_std.clamp(*LOG_STD_RANGE).exp())

    @property
    def _parts(self) -> dict[str, Tensor]:
        return self.space.split_parameters(self.parameters)

    @property
    def _further(self) -> list[tuple[Normal | LogNormal, int]]:
        """The further parts that have values of their own in each interval, with their number."""
        found = ((self.history, self.space.history), (self.guidance, 1))
        return [(part, count) for part, count in found if part is not None]

    def _shared(self, value: Tensor) -> Tensor:
        """A number for the whole grid, in equal parts for the intervals."""
        count = self.parameters.shape[-2]
        return (value / count).unsqueeze(-1).expand(*value.shape, count)

    def log_prob_per_interval(self, action: Tensor) -> Tensor:
        """Log-density of actions [..., N, A]; returns [..., N], to each of which the grid adds an equal part."""
        segments, weights, scales = self.space.split_action(action)
        total: Tensor = self.segments.log_prob(segments) + self.weights.log_prob(weights)
        for distribution, value in zip(self.scales, scales, strict=True):
            total = total + distribution.log_prob(value).sum(-1)
        grid, history, guidance = self.space.split_further(action)
        if (shares := self.grid) is not None:
            total = total + self._shared(shares.log_prob(grid))  # type: ignore[no-untyped-call]
        for further, value in ((self.history, history), (self.guidance, guidance)):
            if further is not None:
                total = total + further.log_prob(value).sum(-1)  # type: ignore[no-untyped-call]
        return total

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density summed over intervals; [...]."""
        return self.log_prob_per_interval(action).sum(-1)

    def entropy_per_interval(self) -> Tensor:
        """Differential entropy of each interval, [..., N]."""
        total: Tensor = self.segments.entropy() + self.weights.entropy()
        for distribution in [*self.scales, *(part for part, _ in self._further)]:
            total = total + distribution.entropy().sum(-1)  # type: ignore[no-untyped-call]
        return total if self.grid is None else total + self._shared(self.grid.entropy())  # type: ignore[no-untyped-call]

    def kl_per_interval(self, other: "TableDistribution") -> Tensor:
        """KL(self || other) of each interval, [..., N]."""
        total: Tensor = kl_divergence(self.segments, other.segments) + kl_divergence(self.weights, other.weights)
        own = [*self.scales, *(part for part, _ in self._further)]
        for mine, theirs in zip(own, [*other.scales, *(part for part, _ in other._further)], strict=True):
            total = total + kl_divergence(mine, theirs).sum(-1)
        if self.grid is None or other.grid is None:
            return total
        return total + self._shared(kl_divergence(self.grid, other.grid))

    def mean_action(self) -> Tensor:
        """The mean of the distribution as an action, [..., N, A]; the deployed solver uses it."""
        grid = [] if self.grid is None else [self.grid.mean.unsqueeze(-1)]
        further = [*grid, *(part.mean for part, _ in self._further)]
        return torch.cat([self.segments.mean, self.weights.mean, *(s.mean for s in self.scales), *further], dim=-1)

    def mean_table(self) -> SolverTable:
        """The deployed solver's table."""
        return self.space.table(self.mean_action())

    def draw(self, seed: int) -> FloatArray:
        """One action [N, A], which depends on the parameters [N, W] and the seed alone, not on the machine."""
        rng = stream(Purpose.TABLE, seed)
        simplices = [_simplex(rng, distribution) for distribution in (self.segments, self.weights)]
        normals = [
            np.exp(s.loc.double().numpy() + s.scale.double().numpy() * rng.standard_normal(tuple(s.loc.shape)))
            for s in self.scales
        ]
        further = [] if self.grid is None else [_simplex(rng, self.grid)[..., None]]
        for part, _ in self._further:  # after the rest, so that a space without these parts draws what it always drew
            values = part.loc.double().numpy() + part.scale.double().numpy() * rng.standard_normal(
                tuple(part.loc.shape)
            )
            further.append(np.exp(values) if isinstance(part, LogNormal) else values)
        return np.concatenate([*simplices, *normals, *further], axis=-1).astype(np.float32)


def _simplex(rng: np.random.Generator, distribution: Dirichlet) -> npt.NDArray[np.float64]:
    """A draw from a Dirichlet distribution, with no part too small for its density."""
    gammas = rng.standard_gamma(distribution.concentration.double().numpy())
    parts = gammas / np.maximum(gammas.sum(-1, keepdims=True), 1e-300)
    parts = np.maximum(parts, SMALLEST_PART)
    found: npt.NDArray[np.float64] = parts / parts.sum(-1, keepdims=True)
    return found


def _of_earlier(history: Tensor) -> Tensor:
    """The history [..., N, H] with zeros where there is no earlier interval."""
    first = torch.arange(history.shape[-2])[:, None] <= torch.arange(history.shape[-1])
    return history.masked_fill(first.to(history.device), 0.0)


def _log_normal(log_mean: Tensor, std: Tensor) -> LogNormal:
    """A log-normal with mean exp(log_mean), whose logarithm has the standard deviation `std`."""
    return LogNormal(log_mean - std**2 / 2, std)


def _inside_simplex(parts: Tensor) -> Tensor:
    parts = parts.clamp_min(SMALLEST_PART)
    return parts / parts.sum(-1, keepdim=True)


def base_parameters(
    table: SolverTable, space: TableSpace, concentration: float, guidance_scale: float | None = None
) -> Tensor:
    """Parameters [N, W] of a distribution whose mean is a given table, so that the policy starts as that table.

    Args:
        table: one table [N, K], whose segments and weights are at least 0.001.
        space: which numbers of a table are drawn.
        concentration: total concentration of each Dirichlet, > 0 (10 to 30 in practice); of the grid's, per interval.
        guidance_scale: the guidance scale of a table that sets none; needed where guidance is drawn.

    Raises:
        TableError: one table per sample, another K, parts that are not drawn, or an entry too small to be a mean.
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
    return torch.cat([*parameters, *_further_base(table, space, concentration, guidance_scale)], dim=1)


def _further_base(
    table: SolverTable, space: TableSpace, concentration: float, guidance_scale: float | None
) -> list[Tensor]:
    """The parameters of grid, history and guidance, [N, ...] each."""
    count, found = table.intervals, []
    drawn = {"grid": space.grid, "history": bool(space.history), "guidance": space.guidance}
    for name in table.interval_columns():
        if not drawn[name]:
            raise TableError(f"the start table has {name}, which would be lost: set solver.{name}")
    if table.reused != [i for i, reused in enumerate(space.reuse) if reused]:
        raise TableError(f"the start table reuses in the intervals {table.reused}, the space has {list(space.reuse)}")
    if space.grid:
        shares = torch.full((count,), 1 / count) if table.grid is None else table.grid.float()
        found.append(torch.log(concentration * count * shares)[:, None])
    if space.history:
        weights = torch.zeros(count, space.history)
        if table.history is not None:
            if table.depth - 1 > space.history:
                raise TableError(f"the start table weighs {table.depth - 1} earlier drifts, not {space.history}")
            weights[:, : table.depth - 1] = table.history.float()
        found += [weights, torch.full_like(weights, INITIAL_LOG_STD)]
    if space.guidance:
        if table.guidance is None and guidance_scale is None:
            raise TableError("guidance is drawn, but neither the start table nor the run says around which scale")
        scales = torch.full((count,), float(guidance_scale or 0)) if table.guidance is None else table.guidance.float()
        found += [scales.log()[:, None], torch.full((count, 1), INITIAL_LOG_STD)]
    return found


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
    grid = levels(table, sigmas).double().unsqueeze(-1)  # [N + 1, 1] or [B, N + 1, 1]
    largest = largest_sigma(form, sigmas[0].double())
    if largest is None or table.scale_time is None:
        return table
    inner = inner_sigma(grid[..., :-1, :], grid[..., 1:, :], table.positions.double())
    return replace(table, scale_time=bounded_time_scale(table.scale_time, inner, largest))


def bound_concentration(parameters: Tensor, space: TableSpace, bound: float) -> Tensor:
    """Scale the concentrations of each Dirichlet down to a total of at most `bound`, which keeps their means.

    Without a bound the policy becomes so narrow that the rewards of a group differ only by noise, which the advantages
    would then amplify.

    Args:
        parameters: [..., N, W].
        space: which numbers of a table are drawn.
        bound: largest total concentration, > 0; that of the grid is as large for each interval.
    """
    parts = space.split_parameters(parameters)
    for name in ("segments", "weights"):
        excess = (parts[name].logsumexp(-1, keepdim=True) - math.log(bound)).clamp_min(0)
        parts[name] = parts[name] - excess
    if space.grid:
        largest = math.log(bound * parameters.shape[-2])
        parts["grid"] = parts["grid"] - (parts["grid"].logsumexp(-2, keepdim=True) - largest).clamp_min(0)
    return torch.cat([*parts.values()], dim=-1)
