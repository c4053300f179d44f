"""The EPD step divided into single calls of the network, for a caller that owns the loop, such as a pipeline.

`epd_ray.solvers.epd.epd` computes the same with the loop inside.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epd_ray.errors import TableError
from epd_ray.solvers.epd import analytic_drift, multistep, spread, stages
from epd_ray.solvers.network import Network
from epd_ray.solvers.solver import Solver

Call = tuple[int, slice | None]
"""A call of the network: the index of its interval, and which points it evaluates (None: the interval's start)."""


@dataclass(frozen=True)
class PointInputs:
    """The network's input when the points of an interval are evaluated in one batch.

    Attributes:
        hidden: [R, k, ...], the k points for each of the R rows that the pipeline gives its network.
        timesteps: [k], float32, the network's timestep at each point.
    """

    hidden: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class GuidedCall:
    """What the table says about the guidance of the next call of the network.

    Attributes:
        scale: the guidance scale; None for that of the pipeline.
        gains: [k], what a difference of the network's output is multiplied with to be one of the drift, at each point.
        effect: [B, ...], what the prompt adds to the drift, where this call leaves out the pass without the prompt and
            takes it from an earlier call; None where it does not.
        keep: takes what the prompt adds to the drift [B, ...], where both passes were made.
    """

    scale: float | None
    gains: Tensor
    effect: Tensor | None
    keep: Callable[[Tensor], None]


class Plan:
    """Which calls of the network a solver makes, in order, and the arithmetic around each one.

    Args:
        solver: its form must be known.
        network: the conventions of the network that is called.
        parallel: whether all points of an interval are evaluated in one call.
    """

    def __init__(self, solver: Solver, network: Network, *, parallel: bool) -> None:
        self.solver, self.network, self.parallel = solver, network, parallel
        calls: list[Call] = []
        for i in range(solver.table.intervals):
            first, end = solver.table.known_points(i, solver.afs), solver.table.points
            points = [slice(j, j + 1) for j in range(first, end)]
            if parallel and points:
                points = [slice(first, end)]
            calls += [(i, part) for part in (None, *points)]
        # A pipeline for a flow model shows its network the latents as they are. So with one point per call, an
        # analytical first step cannot save the first call: it is made, and its answer is not used.
        self.calls = calls[1:] if solver.afs and (parallel or not network.flow) else calls
        self.order = 1 + len(points)
        self._inner, self._offsets, self._gains = (values[0] for values in stages(solver.table, solver.sigmas))
        self.depth = max(solver.order, solver.table.depth)

    def sigma(self, call: Call) -> Tensor:
        """The sigmas [k] at which a call evaluates the drift, float64, on the CPU."""
        interval, part = call
        return self.solver.sigmas[interval : interval + 1] if part is None else self._inner[interval, part]

    def points(self, x: Tensor, slope: Tensor, call: Call) -> Tensor:
        """The points [B, k, ...] of a call: x [B, ...] moved along a slope, or x itself at an interval's start."""
        x = x.unsqueeze(1)
        interval, part = call
        return x if part is None else x + spread(self._offsets[interval, part], x) * slope.unsqueeze(1)

    def at_start(self, drift: Tensor, interval: int) -> Tensor | float:
        """What the drift [B, ...] at an interval's start adds to the interval's slope; 0 without a start point."""
        known = self.solver.table.known_points(interval, self.solver.afs)
        return self.weighted(drift.unsqueeze(1), (interval, slice(0, 1))) if known else 0.0

    def weighted(self, drifts: Tensor, call: Call) -> Tensor:
        """What the drifts [B, k, ...] at a call's points add to the interval's slope, [B, ...]."""
        return (spread(self._gains[call], drifts) * drifts).sum(1)

    def slope(self, history: Sequence[Tensor]) -> Tensor:
        """The slope [B, ...] that leads from an interval's start to its points."""
        return multistep([*history][: self.solver.order])

    def past(self, history: Sequence[Tensor], interval: int) -> Tensor | float:
        """What the drifts of earlier intervals add to the interval's slope; 0 where the table has no history."""
        weights = self.solver.table.history
        if weights is None:
            return 0.0
        older = [*history][1 : weights.shape[-1] + 1]
        return sum(float(w) * (history[0] - d) for w, d in zip(weights[interval], older, strict=False))

    def gains(self, call: Call) -> Tensor:
        """What the network's output is multiplied with in the drift at a call's points, [k]."""
        sigma = self.sigma(call)
        return self.network.drift(torch.ones_like(sigma)[None], torch.zeros_like(sigma)[None], sigma)[0]

    def level(self, call: Call) -> float:
        """The sigma of the latents that the caller holds before a call: at an interval's start, or at its point."""
        interval, part = call
        start = self.solver.sigmas[interval].item()
        return start if part is None or self.parallel else start + self._offsets[interval, part].item()

    def analytic(self, x: Tensor) -> Tensor:
        """The analytical first drift at x [B, ...], which needs no network."""
        return analytic_drift(x, self.solver.sigmas[0].item(), self.solver.form)


class Loop:
    """One denoising loop: the state that changes from call to call, kept in float32 or wider.

    Args:
        plan: the calls of the loop.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.made = plan, 0
        self._effect: Tensor | None = None  # [B, ...], of the prompt on the drift, when both passes were last made
        self._history: deque[Tensor] = deque(maxlen=plan.depth)
        self._x: Tensor | None = None  # [B, ...], at the interval's start
        self._total: Tensor | float = 0.0  # sum of the interval's weighted drifts so far
        self._returned: Tensor | None = None
        self._exact: Tensor | None = None  # `_returned` before it was rounded
        self._version = 0

    @property
    def done(self) -> bool:
        """Whether all calls have been made."""
        return self.made == len(self.plan.calls)

    @property
    def call(self) -> Call:
        """The next call."""
        return self.plan.calls[self.made]

    @property
    def level(self) -> float:
        """The sigma of the latents that the caller holds."""
        return self.plan.solver.sigmas[self.call[0]].item() if self._x is None else self.plan.level(self.call)

    @property
    def guided(self) -> GuidedCall:
        """What the table says about the guidance of the next call."""
        table, interval = self.plan.solver.table, self.call[0]
        scale = None if table.guidance is None else table.guidance[interval].item()
        effect = self._effect if interval in table.reused else None
        return GuidedCall(scale, self.plan.gains(self.call), effect, self._keep)

    def _keep(self, effect: Tensor) -> None:
        self._effect = effect

    def seen(self, rows: Tensor) -> Tensor:
        """The network's input in the next call.

        Args:
            rows: [R, ...], the latents that the caller holds; R is 2 * B where classifier-free guidance repeats them.

        Returns:
            Points [R, k, ...] in the scale of the network's input and the dtype of rows.
        """
        x = _widen(rows)
        if self.call[1] is not None and (self._x is None or self.plan.parallel):
            if self._x is None:
                points = self.plan.points(x, self.plan.analytic(x), self.call)
            else:
                points = self.plan.points(self._x, self.plan.slope(self._history), self.call)  # [B, k, ...]
                points = points.repeat(len(rows) // len(points), *[1] * (points.ndim - 1))
        else:
            points = x.unsqueeze(1)
        return self.plan.network.scaled(points, self.plan.sigma(self.call)).to(rows.dtype)

    def advance(self, output: Tensor, sample: Tensor) -> Tensor:
        """Take the network's output in the next call and move on.

        Args:
            output: [B * k, ...], row b * k + j for point j of the call and sample b.
            sample: [B, ...], the tensor that the last call returned. If the caller changed or replaced it, the new
                values count: as the state at an interval's start, or as the one point that this call evaluated.

        Returns:
            The latents [B, ...] for the next call, in the dtype of sample.

        Source: EPD-Solver (arXiv 2507.14797).
        """
        plan, call, state = self.plan, self.call, self._recall(sample)
        interval, part = call
        if part is None or self._x is None:
            self._x = state
        if part is None:
            self._history.appendleft(
                plan.analytic(state)
                if plan.solver.afs and interval == 0
                else self._drift(output, state.unsqueeze(1), call)[:, 0]
            )
            self._total = plan.at_start(self._history[0], interval) + plan.past(self._history, interval)
        else:
            computed = plan.parallel or not self._history
            if not self._history:
                self._history.appendleft(plan.analytic(state))
            points = plan.points(self._x, self.plan.slope(self._history), call) if computed else state.unsqueeze(1)
            self._total = self._total + plan.weighted(self._drift(output, points, call), call)
        self.made += 1
        if self.done or self.call[0] > interval:
            a, b = plan.solver.sigmas[interval : interval + 2].tolist()
            return self._remember(self._x + (b - a) * self._total, sample.dtype)
        if plan.parallel:
            return self._remember(self._x, sample.dtype)
        return self._remember(plan.points(self._x, self.plan.slope(self._history), self.call)[:, 0], sample.dtype)

    def _drift(self, output: Tensor, points: Tensor, call: Call) -> Tensor:
        # [B * k, ...] -> [B, k, ...]
        return self.plan.network.drift(_widen(output).reshape(points.shape), points, self.plan.sigma(call))

    def _recall(self, sample: Tensor) -> Tensor:
        """The unrounded state behind a sample that was returned last and is unchanged; otherwise the sample itself."""
        if sample is self._returned and self._exact is not None and _version(sample) == self._version:
            return self._exact
        return _widen(sample)

    def _remember(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        self._exact, self._returned = exact, exact.to(dtype)
        self._version = _version(self._returned)
        return self._returned


def check_shapes(loop: Loop, output: Tensor, sample: Tensor) -> None:
    """Refuse an output whose shape does not fit the next call.

    Raises:
        TableError: the message names both shapes.
    """
    part = loop.call[1]
    expected = (len(sample) * (1 if part is None else part.stop - part.start), *sample.shape[1:])
    if tuple(output.shape) != expected:
        raise TableError(f"model_output has shape {list(output.shape)}, expected {list(expected)}")


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for tensors made under torch.inference_mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version
