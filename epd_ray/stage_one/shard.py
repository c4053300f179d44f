"""What both ways of stage 1 start from: a shard of prompts, the student's own state and the teacher's next one."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epd_ray.solvers import SolverTable, dpm2, epd
from epd_ray.solvers.conditioned import conditioned_drift, noises
from epd_ray.solvers.epd import analytic_drift, multistep
from epd_ray.types import Backbone, Drift

KEPT_BYTES = 1 << 30  # of states in a worker; what is dropped is made again


@dataclass(frozen=True)
class Points:
    """One interval of a table.

    Attributes:
        positions: [K], in (0, 1).
        weights: [K], summing to 1.
        scale_dir: [K], > 0; None stands for ones, as in SolverTable.
        scale_time: likewise.
    """

    positions: tuple[float, ...]
    weights: tuple[float, ...]
    scale_dir: tuple[float, ...] | None = None
    scale_time: tuple[float, ...] | None = None

    def columns(self) -> list[Tensor]:
        """Those that are there, each [1, K], float64."""
        all_of_them = (self.positions, self.weights, self.scale_dir, self.scale_time)
        return [torch.tensor([values], dtype=torch.float64) for values in all_of_them if values is not None]


@dataclass(frozen=True)
class Fit:
    """An interval's points, and the relative squared distance that they leave, in units of the teacher's step."""

    points: Points
    residual: float


def as_table(fits: Sequence[Fit]) -> SolverTable:
    """The table of one fit per interval."""
    return table_of([fit.points for fit in fits])


def table_of(points: Sequence[Points]) -> SolverTable:
    """The table of N intervals, whose points may be in any order."""
    columns = zip(*(p.columns() for p in points), strict=True)
    return SolverTable.from_unsorted(*(torch.cat(rows) for rows in columns))


@dataclass(frozen=True)
class Shard:
    """A few prompts and the interval that is fitted on them: all that an answer depends on.

    Attributes:
        prompts: B.
        noise_seeds: B.
        intervals: N of the whole schedule.
        fitted: the intervals so far; the next one is to be fitted.
        teacher_steps: DPM-Solver-2 steps of the teacher per interval.
        afs: analytical first step of the student.
        order: of the student's multistep slope.
    """

    prompts: tuple[str, ...]
    noise_seeds: tuple[int, ...]
    intervals: int
    fitted: tuple[Points, ...]
    teacher_steps: int
    afs: bool = False
    order: int = 1


@dataclass(frozen=True)
class Interval:
    """Where an interval begins and should end.

    Attributes:
        drift: of the shard's prompts.
        sigmas: [2], float64.
        x: [B, ...], the student's own state at sigmas[0].
        slope: [B, ...], which leads from x to the points.
        target: [B, ...], the teacher's state at sigmas[1].
    """

    drift: Drift
    sigmas: Tensor
    x: Tensor
    slope: Tensor
    target: Tensor


class ShardStates:
    """A worker's states, kept on the CPU between calls.

    Args:
        backbone: the frozen model.
        guidance_scale: for student and teacher.
    """

    def __init__(self, backbone: Backbone, guidance_scale: float) -> None:
        self.backbone, self.guidance_scale = backbone, guidance_scale
        self._kept: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    @torch.no_grad()  # not inference_mode: no graph could keep such states
    def interval(self, shard: Shard) -> Interval:
        """The interval after those that the shard has points for."""
        i = len(shard.fitted)
        drift = conditioned_drift(self.backbone, self.backbone.encode(shard.prompts, self.guidance_scale))
        sigmas = self.backbone.sigmas(shard.intervals)
        start = self.backbone.initial(noises(self.backbone, shard.noise_seeds))
        x, slope = self._recall(shard, lambda: self._student(shard, drift, start, sigmas))
        key = (shard.prompts, shard.noise_seeds, shard.intervals, shard.teacher_steps)
        teacher = self._recall(key, lambda: teacher_states(drift, start, sigmas, shard.teacher_steps))
        return Interval(drift, sigmas[i : i + 2], x.to(start), slope.to(start), teacher[i].to(start))

    def _student(self, shard: Shard, drift: Drift, start: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """The state after the fitted intervals, and the slope there."""
        states = [start]
        if i := len(shard.fitted):
            table, form = table_of(shard.fitted), self.backbone.form
            epd(
                drift, start, sigmas[: i + 1], table, afs=shard.afs, order=shard.order, form=form,
                callback=lambda _, sigma, x: states.append(x),
            )  # fmt: skip
        history: deque[Tensor] = deque()
        for j in range(max(0, i + 1 - shard.order), i + 1):
            x, sigma = states[j], float(sigmas[j])
            analytic = shard.afs and j == 0
            d = analytic_drift(x, sigma, self.backbone.form) if analytic else drift(x, x.new_full(x.shape[:1], sigma))
            history.appendleft(d)
        return states[-1], multistep(history)

    def _recall(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What was kept under the key, or is made now; where room is short, what was not used for longest goes."""
        if key not in self._kept:
            self._kept[key] = tuple(state.cpu() for state in make())
            while len(self._kept) > 1 and sum(s.nbytes for kept in self._kept.values() for s in kept) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def teacher_states(drift: Drift, start: Tensor, sigmas: Tensor, steps: int) -> tuple[Tensor, ...]:
    """The teacher's state at the end of each interval: DPM-Solver-2 with so many steps in each."""
    states: list[Tensor] = []

    def keep(step: int, sigma: float, x: Tensor) -> None:
        if (step + 1) % steps == 0:
            states.append(x.cpu())

    dpm2(drift, start, refine(sigmas, steps), callback=keep)
    return tuple(states)


def refine(sigmas: Tensor, steps: int) -> Tensor:
    """Each interval of sigmas [N+1] in `steps` equal parts; [N * steps + 1]."""
    parts = torch.linspace(0, 1, steps + 1, dtype=sigmas.dtype)[:-1]
    inner = sigmas[:-1, None] + (sigmas[1:] - sigmas[:-1])[:, None] * parts
    return torch.cat([inner.flatten(), sigmas[-1:]])
