"""The EPD step one network call at a time, for whoever owns the loop; `epd` is the same with the loop inside."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from epd_ray.errors import TableError
from epd_ray.solvers.epd import analytic_drift, multistep, spread, stages
from epd_ray.solvers.network import Network
from epd_ray.solvers.solver import Solver

Call = tuple[int, slice | None]
"""A call of the network: its interval, and its points (None at the interval's start)."""


@dataclass(frozen=True)
class PointInputs:
    """What the network sees when the points of an interval are one batch.

    Attributes:
        hidden: [R, K, ...], for R rows of the pipeline's own input.
        timesteps: [K], float32.
    """

    hidden: Tensor
    timesteps: Tensor


class Plan:
    """Which calls a solver makes, and where.

    Args:
        solver: with a form.
        network: its conventions.
        parallel: whether an interval's points are one call.
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
        # One call at a time, the caller of a flow model's network shows it the state as it is: the first call of the
        # analytical first step cannot be a point, so the state is shown and the answer left unused.
        self.calls = calls[1:] if solver.afs and (parallel or not network.flow) else calls
        self.order = 1 + len(points)
        self._inner, self._offsets, self._gains = (values[0] for values in stages(solver.table, solver.sigmas))

    def sigma(self, call: Call) -> Tensor:
        """Evaluated sigmas [k], float64, on the CPU."""
        interval, part = call
        return self.solver.sigmas[interval : interval + 1] if part is None else self._inner[interval, part]

    def points(self, x: Tensor, slope: Tensor, call: Call) -> Tensor:
        """x [B, ...] at the points of a call along a slope, [B, k, ...]; at an interval's start x itself."""
        x = x.unsqueeze(1)
        interval, part = call
        return x if part is None else x + spread(self._offsets[interval, part], x) * slope.unsqueeze(1)

    def at_start(self, drift: Tensor, interval: int) -> Tensor | float:
        """The share in an interval's slope of the drift [B, ...] at its start, where a point stands there."""
        known = self.solver.table.known_points(interval, self.solver.afs)
        return self.weighted(drift.unsqueeze(1), (interval, slice(0, 1))) if known else 0.0

    def weighted(self, drifts: Tensor, call: Call) -> Tensor:
        """The share [B, ...] in an interval's slope of the drifts [B, k, ...] at a call's points."""
        return (spread(self._gains[call], drifts) * drifts).sum(1)

    def analytic(self, x: Tensor) -> Tensor:
        """The first drift without the network, at x [B, ...]."""
        return analytic_drift(x, self.solver.sigmas[0].item(), self.solver.form)


class Loop:
    """One denoising loop: everything that changes from call to call. The state is float32 or wider.

    Args:
        plan: of its calls.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.made = plan, 0
        self._history: deque[Tensor] = deque(maxlen=plan.solver.order)
        self._x: Tensor | None = None  # [B, ...], at the interval's start
        self._total: Tensor | float = 0.0  # of the interval's weighted drifts so far
        self._returned: Tensor | None = None
        self._exact: Tensor | None = None  # `_returned` before it was rounded
        self._version = 0

    @property
    def done(self) -> bool:
        """Whether all calls are made."""
        return self.made == len(self.plan.calls)

    @property
    def call(self) -> Call:
        """The next one."""
        return self.plan.calls[self.made]

    def seen(self, rows: Tensor) -> Tensor:
        """What the network sees in the next call.

        Args:
            rows: [R, ...], the latents that the caller holds, repeated as the caller's guidance needs.

        Returns:
            Points [R, k, ...] in the network's scale, dtype of rows.
        """
        x = _widen(rows)
        if self.call[1] is not None and (self._x is None or self.plan.parallel):
            if self._x is None:
                points = self.plan.points(x, self.plan.analytic(x), self.call)
            else:
                points = self.plan.points(self._x, multistep(self._history), self.call)  # [B, k, ...]
                points = points.repeat(len(rows) // len(points), *[1] * (points.ndim - 1))
        else:
            points = x.unsqueeze(1)
        return self.plan.network.scaled(points, self.plan.sigma(self.call)).to(rows.dtype)

    def advance(self, output: Tensor, sample: Tensor) -> Tensor:
        """Take the network's answer.

        Args:
            output: [B * k, ...], row b * k + j for the call's point j.
            sample: [B, ...], as returned last; where it is another tensor, that one counts at an interval's start,
                and inside an interval for its own point alone.

        Returns:
            The latents [B, ...] for the next call, dtype of sample.

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
            self._total = plan.at_start(self._history[0], interval)
        else:
            computed = plan.parallel or not self._history
            if not self._history:
                self._history.appendleft(plan.analytic(state))
            points = plan.points(self._x, multistep(self._history), call) if computed else state.unsqueeze(1)
            self._total = self._total + plan.weighted(self._drift(output, points, call), call)
        self.made += 1
        if self.done or self.call[0] > interval:
            a, b = plan.solver.sigmas[interval : interval + 2].tolist()
            return self._remember(self._x + (b - a) * self._total, sample.dtype)
        if plan.parallel:
            return self._remember(self._x, sample.dtype)
        return self._remember(plan.points(self._x, multistep(self._history), self.call)[:, 0], sample.dtype)

    def _drift(self, output: Tensor, points: Tensor, call: Call) -> Tensor:
        # [B * k, ...] -> [B, k, ...]
        return self.plan.network.drift(_widen(output).reshape(points.shape), points, self.plan.sigma(call))

    def _recall(self, sample: Tensor) -> Tensor:
        """The state behind a sample: unrounded where it is the tensor that was returned last, untouched since."""
        if sample is self._returned and self._exact is not None and _version(sample) == self._version:
            return self._exact
        return _widen(sample)

    def _remember(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        self._exact, self._returned = exact, exact.to(dtype)
        self._version = _version(self._returned)
        return self._returned


def check_shapes(loop: Loop, output: Tensor, sample: Tensor) -> None:
    """Refuse an output that is not of the next call's points.

    Raises:
        TableError: with both shapes.
    """
    part = loop.call[1]
    expected = (len(sample) * (1 if part is None else part.stop - part.start), *sample.shape[1:])
    if tuple(output.shape) != expected:
        raise TableError(f"model_output has shape {list(output.shape)}, expected {list(expected)}")


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _version(tensor: Tensor) -> int:
    """Counts changes in place; tensors made under torch.inference_mode keep no count."""
    return 0 if tensor.is_inference() else tensor._version
