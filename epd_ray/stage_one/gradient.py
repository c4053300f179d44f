"""Stage 1 by back-propagation: gradient descent on the distance between the table's own step and the teacher's.

Intervals are fitted one after the other, each from the student's own state, as in the EPD authors' code. Positions r,
weights w, direction scales o and time scales c are functions of unbounded parameters p, q, u and v:

    r = m + (1 - 2m) sigmoid(p),  w = f + (1 - K f) softmax(q),  o, c = 2 S sigmoid(u/2 or v/2) + 1 - S

with m the margin that a Dirichlet needs, f the smallest weight and S the range of the scales; a start point keeps
r = 0. The worker of a shard returns the loss and its derivatives by r, w, o and c. The driver, which alone holds p, q,
u and v, adds them up and makes the step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from epd_ray.errors import ModelError
from epd_ray.solvers import SolverTable
from epd_ray.solvers.epd import epd
from epd_ray.solvers.interval import bounded_time_scale, inner_sigma
from epd_ray.stage_one.least_squares import END_MARGIN, Matrix
from epd_ray.stage_one.shard import Fit, Interval, Points
from epd_ray.types import Drift

MARGIN = END_MARGIN / 2  # smaller than the grid's margin, so that all grid positions can be represented
LOGIT_BOUND = 6.0  # for a start value on the border, which no sigmoid reaches


@dataclass(frozen=True)
class Loss:
    """The loss of one shard, or the sum over several.

    Attributes:
        distance: squared distance between the student's next state and the teacher's.
        step: squared length of the teacher's step from the student's state; distance / step is the residual.
        gradient: derivatives of the distance, one row for each column of the points, [2 to 4, K]; zeros where none were
            asked for.
        size: number of latent values that the distance sums over.
        passes: the network passes that it took, those of back-propagation included.
    """

    distance: float
    step: float
    gradient: Matrix
    size: int
    passes: int = 0

    @property
    def residual(self) -> float:
        return self.distance / self.step

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            self.distance + other.distance,
            self.step + other.step,
            self.gradient + other.gradient,
            self.size + other.size,
            self.passes + other.passes,
        )


def distill_loss(interval: Interval, points: Points, gradient: bool, checkpointed: bool = True) -> Loss:
    """The squared distance between where the points lead and the teacher's state, with its gradient on request.

    Args:
        interval: the states of B prompts.
        points: the table's points in this interval, in any order.
        gradient: whether to compute the gradient.
        checkpointed: whether the network runs again during back-propagation, so that only one forward pass of B rows is
            held in memory.

    Raises:
        TableError: the points do not make a valid table.
    """
    named = {name: column.requires_grad_(gradient) for name, column in points.columns().items()}
    columns = list(named.values())
    with torch.set_grad_enabled(gradient):
        distance = step_distance(interval, SolverTable.from_unsorted(**named), checkpointed)
    found = torch.autograd.grad(distance, columns) if gradient else [torch.zeros_like(c) for c in columns]
    step = _squared(interval.target - interval.x)
    return Loss(float(distance.detach()), float(step), torch.cat(list(found)).numpy(), interval.x.numel())


def step_distance(interval: Interval, table: SolverTable, checkpointed: bool = True) -> Tensor:
    """The squared distance between the state that `epd` reaches with a table [1, K] and the teacher's state.

    Args:
        interval: the states of B prompts.
        table: its tensors may require a gradient; the result is differentiable in them.
        checkpointed: see `distill_loss`.

    Returns:
        A float64 scalar on the CPU.
    """
    drift = _in_turn(interval, checkpointed and torch.is_grad_enabled())
    reached = epd(drift, interval.x, interval.sigmas, table)
    return _squared((reached if interval.moved is None else reached + interval.moved) - interval.target)


def _in_turn(interval: Interval, checkpointed: bool) -> Drift:
    """A drift for one step of `epd`: its first call returns the known slope, and K points become K calls of B rows."""
    known = [interval.slope]

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        if known:
            return known.pop()
        states, levels = (v.unflatten(0, (len(interval.x), -1)).unbind(1) for v in (x, sigma))
        found = []
        for x_k, sigma_k in zip(states, levels, strict=True):
            if checkpointed:
                d_k = checkpoint(interval.drift, x_k, sigma_k, use_reentrant=False, preserve_rng_state=False)
            else:
                d_k = interval.drift(x_k, sigma_k)
            if x_k.requires_grad and not d_k.requires_grad:
                raise ModelError("the backbone's drift gives no gradient: set distill.method=least_squares")
            found.append(d_k)
        return torch.stack(found, 1).flatten(0, 1)  # [B * K, ...]

    return drift


def _squared(x: Tensor) -> Tensor:
    """Squared norm in float64, on the CPU because not every device has that type."""
    return x.cpu().double().square().sum()


@dataclass(frozen=True)
class Descent:
    """Options of the gradient descent on an interval's points.

    Attributes:
        steps: number of Adam steps.
        lr: learning rate of the first step; it falls to 0 along half a cosine.
        batch: number of shards per step, at least 1.
        min_weight: f, the smallest weight that a point may have.
        scale_range: S in [0, 1); scales lie in [1 - S, 1 + S]. 0 trains no scales.
        scale_time: whether time scales are trained beside the direction scales.
        start_point: whether the first point stays at position 0.
        max_sigma: the largest sigma at which a point may be evaluated, see `interval.largest_sigma`; None: no bound.
    """

    steps: int
    lr: float
    batch: int
    min_weight: float
    scale_range: float = 0.0
    scale_time: bool = False
    start_point: bool = False
    max_sigma: float | None = None


Evaluate = Callable[[Points, Sequence[int], bool], list[Loss]]
"""evaluate(points, shards, gradient) returns the losses of the shards with these indices, in order."""


def descend(evaluate: Evaluate, shards: int, sigmas: tuple[float, float], start: Points, options: Descent) -> Fit:
    """Improve one interval's points with Adam, and return the start or the result, whichever has the lower residual.

    Args:
        evaluate: computes losses of shards on the workers, see `Evaluate`.
        shards: number of shards.
        sigmas: the sigmas at the interval's start and end.
        start: the points to start from, in order of position; scales that they lack start at 1.
        options: see `Descent`.
    """
    start = _with_scales(start, options)
    raw = raw_parameters(start, options).requires_grad_()
    optimizer = torch.optim.Adam([raw], options.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    batches, passes = _batches(shards, options.batch), 0
    for _ in range(options.steps):
        columns = point_columns(raw, sigmas, options)
        loss = total(evaluate(_points(columns), next(batches), True))
        passes += loss.passes
        optimizer.zero_grad()
        columns.backward(torch.from_numpy(loss.gradient / loss.step))
        optimizer.step()
        decay.step()
    ends = [drawable(p, sigmas, options) for p in (start, _points(point_columns(raw, sigmas, options)))]
    found = [(total(evaluate(p, range(shards), False)), p) for p in ends]
    passes += sum(loss.passes for loss, _ in found)
    loss, points = min(found, key=lambda one: one[0].residual)
    return Fit(points, loss.residual, passes)


def _with_scales(points: Points, options: Descent) -> Points:
    """The points with exactly the scales that are trained; absent scales are ones."""
    if not options.scale_range:
        return Points(points.positions, points.weights)
    ones = (1.0,) * len(points.weights)
    scale_time = (points.scale_time or ones) if options.scale_time else None
    return Points(points.positions, points.weights, points.scale_dir or ones, scale_time)


def _batches(shards: int, size: int) -> Iterator[list[int]]:
    """Endless groups of `size` shards, each shard in turn."""
    size, first = min(size, shards), 0
    while True:
        yield [(first + i) % shards for i in range(size)]
        first = (first + size) % shards


def total(losses: Sequence[Loss]) -> Loss:
    """The sum of losses, added in order."""
    return reduce(add, losses)


def point_columns(raw: Tensor, sigmas: tuple[float, float], options: Descent) -> Tensor:
    """The columns r, w and, where they are trained, o and c, [2 to 4, K], of parameters of the same shape."""
    p, q, *scales = raw
    r = MARGIN + (1 - 2 * MARGIN) * p.sigmoid()
    if options.start_point:
        r = torch.cat([torch.zeros_like(r[:1]), r[1:]])
    w = options.min_weight + (1 - len(q) * options.min_weight) * q.softmax(0)
    factors = [2 * options.scale_range * (u / 2).sigmoid() + 1 - options.scale_range for u in scales]
    if len(factors) == 2:
        factors[1] = bounded_time_scale(factors[1], inner_sigma(*sigmas, r), options.max_sigma)
    return torch.stack([r, w, *factors])


def raw_parameters(points: Points, options: Descent) -> Tensor:
    """The parameters p, q, u, v of points, [2 to 4, K], float64; one row for each column that the points have."""
    positions, weights = (torch.tensor(v, dtype=torch.float64) for v in (points.positions, points.weights))
    r = (positions - MARGIN) / (1 - 2 * MARGIN)
    w = (weights - options.min_weight) / (1 - len(weights) * options.min_weight)
    p = r.logit(eps=1e-9).clamp(-LOGIT_BOUND, LOGIT_BOUND)
    q = w.clamp_min(1e-9).log()
    q = (q - q.max()).clamp_min(-LOGIT_BOUND)
    scales = [torch.tensor(v, dtype=torch.float64) for v in (points.scale_dir, points.scale_time) if v is not None]
    shares = [(scale - 1 + options.scale_range) / (2 * options.scale_range) for scale in scales]
    return torch.stack([p, q, *(2 * share.logit(eps=1e-9).clamp(-LOGIT_BOUND, LOGIT_BOUND) for share in shares)])


def _points(columns: Tensor) -> Points:
    positions, weights, *scales = (tuple(row) for row in columns.tolist())
    direction, time = (*scales, None, None)[:2]  # as many as there are
    return Points(positions, weights, direction, time)


def drawable(points: Points, sigmas: tuple[float, float], options: Descent) -> Points:
    """The points sorted by position and moved apart, because a Dirichlet draws the segments between them."""
    rows = torch.cat(list(points.columns().values())).numpy()  # [2 to 4, K]
    rows = rows[:, rows[0].argsort(kind="stable")]
    r, k = rows[0], len(rows[0])
    gap = min(MARGIN, (1 - 2 * MARGIN) / k)
    for i in range(1, k):
        r[i] = max(r[i], r[i - 1] + gap)
    for i in range(k):  # points that were pushed beyond the end come back
        r[i] = min(r[i], 1 - MARGIN - (k - 1 - i) * gap)
    if len(rows) == 4:
        inner = inner_sigma(*sigmas, torch.from_numpy(r))
        rows[3] = bounded_time_scale(torch.from_numpy(rows[3]), inner, options.max_sigma).numpy()
    return _points(torch.from_numpy(rows))
