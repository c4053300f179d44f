"""What both methods of stage 1 start from: a shard of prompts, the student's state, and the teacher's next state."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epd_ray.solvers import SolverTable, dpm2
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.solvers.epd import analytic_drift, check_options, epd_step, multistep, stages
from epd_ray.solvers.table import COLUMN_NAMES
from epd_ray.types import Backbone, Drift, Form

KEPT_BYTES = 1 << 30  # bound on the states that a worker keeps; a state that was dropped is computed again


@dataclass(frozen=True)
class Points:
    """The points of one interval of a table, as a hashable record; the columns are those of SolverTable.

    Attributes:
        positions: [K], in [0, 1).
        weights: [K], summing to 1.
        scale_dir: [K], > 0; None stands for ones.
        scale_time: [K], > 0; None stands for ones.
    """

    positions: tuple[float, ...]
    weights: tuple[float, ...]
    scale_dir: tuple[float, ...] | None = None
    scale_time: tuple[float, ...] | None = None

    def columns(self) -> dict[str, Tensor]:
        """The columns that are given, by their names in SolverTable; each [1, K], float64."""
        values = {name: getattr(self, name) for name in COLUMN_NAMES}
        return {name: torch.tensor([v], dtype=torch.float64) for name, v in values.items() if v is not None}


@dataclass(frozen=True)
class Fit:
    """An interval's points and their residual: the squared distance to the teacher's next state, divided by the squared
    length of the teacher's step."""

    points: Points
    residual: float


def as_table(fits: Sequence[Fit]) -> SolverTable:
    """The table [N, K] made of one fit per interval."""
    return table_of([fit.points for fit in fits])


def table_of(points: Sequence[Points]) -> SolverTable:
    """The table [N, K] made of the points of N intervals; points may be in any order within an interval."""
    columns = [p.columns() for p in points]
    return SolverTable.from_unsorted(**{name: torch.cat([rows[name] for rows in columns]) for name in columns[0]})


@dataclass(frozen=True)
class Shard:
    """A few prompts and the interval that is fitted on them: everything that a worker's answer depends on.

    Attributes:
        prompts: B prompts.
        noise_seeds: B seeds of their initial noise.
        intervals: N, the number of intervals of the whole schedule.
        fitted: the points of the intervals fitted so far; the interval after them is the one to fit.
        teacher_steps: DPM-Solver-2 steps of the teacher in each interval.
        afs: whether the student's first drift is analytical.
        order: order of the student's multistep slope, 1 to 4.
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
    """The states between which an interval is fitted.

    Attributes:
        drift: the backbone's drift for the shard's prompts.
        sigmas: [2], the sigmas at the interval's start and end, float64.
        x: [B, ...], the student's own state at sigmas[0].
        slope: [B, ...], the slope that leads from x to the points.
        target: [B, ...], the teacher's state at sigmas[1].
    """

    drift: Drift
    sigmas: Tensor
    x: Tensor
    slope: Tensor
    target: Tensor


@dataclass(frozen=True)
class _Student:
    """The solver that is being fitted, advanced by one interval at a time.

    Its states at an interval's start are a tuple of tensors [B, ...]: the state x, then the drifts at this start and at
    the starts before it, newest first, as many as the slope combines.
    """

    shard: Shard
    drift: Drift
    sigmas: Tensor
    form: Form

    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, self._first_drift(0, x)

    def step(self, i: int, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Advance the states over interval i with the points that were fitted for it."""
        x, *history = states
        shard, sigmas, table = self.shard, self.sigmas[i : i + 2], table_of(self.shard.fitted[i : i + 1])
        check_options(table, sigmas, afs=shard.afs, order=shard.order, form=self.form)
        a, b = sigmas.tolist()
        points = tuple(values[:, 0].to(x) for values in stages(table, sigmas))
        x = epd_step(self.drift, x, history, b - a, points, table.known_points(i, shard.afs))
        return x, *[self._first_drift(i + 1, x), *history][: shard.order]

    def _first_drift(self, i: int, x: Tensor) -> Tensor:
        """The drift at the start of interval i, where the state is x."""
        sigma = float(self.sigmas[i])
        if self.shard.afs and i == 0:
            return analytic_drift(x, sigma, self.form)
        return self.drift(x, x.new_full(x.shape[:1], sigma))


class ShardStates:
    """The states of teacher and student in a worker, kept on the CPU between calls.

    Args:
        backbone: the frozen model.
        guidance_scale: the guidance scale of both student and teacher.
    """

    def __init__(self, backbone: Backbone, guidance_scale: float) -> None:
        self.backbone, self.guidance_scale = backbone, guidance_scale
        self._kept: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    @torch.no_grad()  # not inference_mode, whose tensors cannot be part of an autograd graph
    def interval(self, shard: Shard) -> Interval:
        """The interval to fit: the one after the intervals that the shard has points for."""
        i = len(shard.fitted)
        drift = ConditionedDrift(self.backbone, self.backbone.encode(shard.prompts, self.guidance_scale))
        sigmas = self.backbone.sigmas(shard.intervals)
        start = self.backbone.initial(noises(self.backbone, shard.noise_seeds))
        self._advance(_Student(shard, drift, sigmas, self.backbone.form), start)
        x, *history = (state.to(start) for state in self._kept[shard])
        key = (shard.prompts, shard.noise_seeds, shard.intervals, shard.teacher_steps)
        if key not in self._kept:
            self._keep(key, teacher_states(drift, start, sigmas, shard.teacher_steps))
        self._kept.move_to_end(key)
        return Interval(drift, sigmas[i : i + 2], x, multistep(history), self._kept[key][i].to(start))

    def _advance(self, student: _Student, start: Tensor) -> None:
        """Compute and keep the student's states after the fitted intervals.

        The computation starts from the latest kept states of this student, which are dropped because nobody needs them
        again, or from the beginning if none are kept.
        """
        shard, goal = student.shard, len(student.shard.fitted)
        if shard in self._kept:
            self._kept.move_to_end(shard)
            return
        done = 0
        states: tuple[Tensor, ...] = ()
        for i in reversed(range(goal)):
            if (earlier := replace(shard, fitted=shard.fitted[:i])) in self._kept:
                done, states = i, tuple(state.to(start) for state in self._kept.pop(earlier))
                break
        states = states or student.begin(start)
        for i in range(done, goal):
            states = student.step(i, states)
        self._keep(shard, states)

    def _keep(self, key: Hashable, states: tuple[Tensor, ...]) -> None:
        """Keep states; beyond KEPT_BYTES, those that were not used for the longest time are dropped."""
        self._kept[key] = tuple(state.cpu() for state in states)
        while len(self._kept) > 1 and sum(s.nbytes for kept in self._kept.values() for s in kept) > KEPT_BYTES:
            self._kept.popitem(last=False)


def teacher_states(drift: Drift, start: Tensor, sigmas: Tensor, steps: int) -> tuple[Tensor, ...]:
    """The teacher's state at the end of each interval, by DPM-Solver-2 with `steps` steps in each interval."""
    states: list[Tensor] = []

    def keep(step: int, sigma: float, x: Tensor) -> None:
        if (step + 1) % steps == 0:
            states.append(x.cpu())

    dpm2(drift, start, refine(sigmas, steps), callback=keep)
    return tuple(states)


def refine(sigmas: Tensor, steps: int) -> Tensor:
    """Sigmas [N * steps + 1] that divide each interval of sigmas [N+1] into `steps` parts of equal width."""
    parts = torch.linspace(0, 1, steps + 1, dtype=sigmas.dtype)[:-1]
    inner = sigmas[:-1, None] + (sigmas[1:] - sigmas[:-1])[:, None] * parts
    return torch.cat([inner.flatten(), sigmas[-1:]])
