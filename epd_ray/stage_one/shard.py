"""What both methods of stage 1 start from: a shard of prompts, the student's state, and the teacher's next state."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from epd_ray.solvers import SolverTable
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.solvers.costs import Cost
from epd_ray.solvers.epd import analytic_drift, check_options, epd_step, multistep, stages
from epd_ray.solvers.table import COLUMN_NAMES
from epd_ray.stage_one.teacher import FinePath, fine_path, refine, teacher_states
from epd_ray.types import Backbone, Drift, Form

KEPT_BYTES = 1 << 30  # bound on the states that a worker keeps; a state that was dropped is computed again


@dataclass(frozen=True)
class Points:
    """One interval of a table, as a hashable record: its points, and the further parts that the table has.

    Attributes:
        positions: [K], in [0, 1).
        weights: [K], summing to 1.
        scale_dir: [K], > 0; None stands for ones.
        scale_time: [K], > 0; None stands for ones.
        history: [H], the weights of the drifts of earlier intervals; None where the table has none.
        guidance: the guidance scale, > 0; None stands for that of the run.
        share: the interval's share of the schedule, > 0; None stands for an equal one.
        reuse: whether the interval reuses the difference that the prompt makes.
    """

    positions: tuple[float, ...]
    weights: tuple[float, ...]
    scale_dir: tuple[float, ...] | None = None
    scale_time: tuple[float, ...] | None = None
    history: tuple[float, ...] | None = None
    guidance: float | None = None
    share: float | None = None
    reuse: bool = False

    def columns(self) -> dict[str, Tensor]:
        """The columns of the points that are given, by their names in SolverTable; each [1, K], float64."""
        values = {name: getattr(self, name) for name in COLUMN_NAMES}
        return {name: torch.tensor([v], dtype=torch.float64) for name, v in values.items() if v is not None}


@dataclass(frozen=True)
class Fit:
    """An interval's points and their residual: the squared distance to the teacher's next state, divided by the squared
    length of the teacher's step; and the network passes that were made to find them, which depend on the workers."""

    points: Points
    residual: float
    passes: int = field(default=0, compare=False)


def as_table(fits: Sequence[Fit]) -> SolverTable:
    """The table [N, K] made of one fit per interval."""
    return table_of([fit.points for fit in fits])


def table_of(points: Sequence[Points]) -> SolverTable:
    """The table [N, K] made of the points of N intervals; points may be in any order within an interval."""
    whole = {"grid": "share", "history": "history", "guidance": "guidance"}
    given = {name: [getattr(p, part) for p in points] for name, part in whole.items()}
    further = {name: torch.tensor(v, dtype=torch.float64) for name, v in given.items() if v[0] is not None}
    reuse = torch.tensor([p.reuse for p in points])
    return replace(points_table(points), **further, reuse=reuse if reuse.any() else None)


def points_table(points: Sequence[Points]) -> SolverTable:
    """The same table without its further parts."""
    columns = [p.columns() for p in points]
    return SolverTable.from_unsorted(**{name: torch.cat([rows[name] for rows in columns]) for name in columns[0]})


@dataclass(frozen=True)
class Parts:
    """What decides the states of stage 1 beside the points of a table.

    Attributes:
        history: H, the number of earlier drifts that an interval may weigh.
        guidance: whether each interval has a guidance scale of its own.
        reuse: the intervals, counted from 0, that reuse the difference that the prompt makes.
        places: [N+1], where the intervals end on the teacher's fine grid, from 0 to its length; empty stands for the
            model's own schedule.
    """

    history: int = 0
    guidance: bool = False
    reuse: tuple[int, ...] = ()
    places: tuple[int, ...] = ()

    @property
    def guides(self) -> bool:
        """Whether the evaluations of an interval may differ in their guidance."""
        return self.guidance or bool(self.reuse)


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
        parts: what the table has beside its points.
    """

    prompts: tuple[str, ...]
    noise_seeds: tuple[int, ...]
    intervals: int
    fitted: tuple[Points, ...]
    teacher_steps: int
    afs: bool = False
    order: int = 1
    parts: Parts = Parts()

    @property
    def depth(self) -> int:
        """The number of drifts that an interval combines at most: its own, and those at earlier starts."""
        return max(self.order, 1 + self.parts.history)


@dataclass(frozen=True)
class Interval:
    """The states between which an interval is fitted.

    Attributes:
        drift: the backbone's drift for the shard's prompts, at the interval's guidance.
        sigmas: [2], the sigmas at the interval's start and end, float64.
        x: [B, ...], the student's own state at sigmas[0].
        slope: [B, ...], the slope that leads from x to the points.
        target: [B, ...], the teacher's state at sigmas[1].
        drifts: [B, ...] each, the student's drifts at this start and at the starts before it, newest first.
        known: whether the first of them is the network's own, and not the analytical one.
        moved: [B, ...], by how much the history moves the student's next state; None where it does not.
    """

    drift: Drift
    sigmas: Tensor
    x: Tensor
    slope: Tensor
    target: Tensor
    drifts: tuple[Tensor, ...] = ()
    known: bool = True
    moved: Tensor | None = None


@dataclass(frozen=True)
class State:
    """The student at an interval's start.

    Attributes:
        x: [B, ...].
        drifts: [B, ...] each, the drift at this start at the run's guidance scale, then the drifts at the starts before
            it as they were used, newest first.
        difference: [B, ...], what the prompt changed when both passes were last made; None where that is not known.
    """

    x: Tensor
    drifts: tuple[Tensor, ...]
    difference: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, *self.drifts, *([] if self.difference is None else [self.difference]))


@dataclass(frozen=True)
class Student:
    """The solver that is being fitted, advanced by one interval at a time.

    Args:
        shard: the prompts and what is fitted so far.
        drift: the drift for these prompts.
        sigmas: [N+1].
        form: how noise enters x.
        guidance_scale: the guidance scale of the run.
    """

    shard: Shard
    drift: ConditionedDrift
    sigmas: Tensor
    form: Form
    guidance_scale: float

    def begin(self, x: Tensor) -> State:
        return self._arrive(0, x, ())

    def step(self, i: int, state: State) -> State:
        """Advance over interval i with the points that were fitted for it."""
        shard, points = self.shard, self.shard.fitted[i]
        sigmas, table = self.sigmas[i : i + 2], points_table([points])
        check_options(table, sigmas, afs=shard.afs, order=shard.order, form=self.form)
        a, b = sigmas.tolist()
        drifts = (self.first(i, state, points.guidance), *state.drifts[1:])
        rows = tuple(values[:, 0].to(state.x) for values in stages(table, sigmas))
        past = None if points.history is None else state.x.new_tensor([points.history])
        self.drift.difference = state.difference
        here = self.at(i, points.guidance)
        known = table.known_points(i, shard.afs)
        x = epd_step(here, state.x, drifts, b - a, rows, known, shard.order, past)
        return self._arrive(i + 1, x, drifts)

    def at(self, i: int, scale: float | None) -> Drift:
        """The drift in interval i at a guidance scale; None stands for that of the run."""
        if not self.shard.parts.guides:
            return self.drift
        told = None if scale is None else torch.tensor(scale, dtype=torch.float64)
        return self.drift.at(told, i in self.shard.parts.reuse)

    def first(self, i: int, state: State, scale: float | None) -> Tensor:
        """The drift at the start of interval i at a guidance scale, without a pass where both parts are known."""
        if scale is None or self.analytic(i):
            return state.drifts[0]
        if state.difference is None:  # the network takes the scale as an input
            return self.at(i, scale)(state.x, self._level(i, state.x))
        return state.drifts[0] + (scale - self.guidance_scale) * state.difference

    def analytic(self, i: int) -> bool:
        """Whether the drift at the start of interval i is a formula."""
        return self.shard.afs and i == 0

    def _arrive(self, i: int, x: Tensor, before: tuple[Tensor, ...]) -> State:
        """The state at the start of interval i, with its drift."""
        if self.analytic(i):
            here = analytic_drift(x, float(self.sigmas[i]), self.form)
        else:
            here = self.at(i, None)(x, self._level(i, x))
        return State(x, (here, *before)[: self.shard.depth], self.drift.difference)

    def _level(self, i: int, x: Tensor) -> Tensor:
        return x.new_full(x.shape[:1], float(self.sigmas[i]))


class ShardStates:
    """The states of teacher and student in a worker, kept on the CPU between calls.

    Args:
        backbone: the frozen model.
        guidance_scale: the guidance scale of both student and teacher.
    """

    def __init__(self, backbone: Backbone, guidance_scale: float) -> None:
        self.backbone, self.guidance_scale = backbone, guidance_scale
        self._kept: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()
        self._drift: ConditionedDrift | None = None

    @property
    def passes(self) -> int:
        """The network passes of the latest task, those of all its prompts together."""
        if self._drift is None:
            return 0
        cost = Cost(0, self._drift.evals, self._drift.unguided)
        return cost.network_passes(self.guidance_scale, self.backbone.classifier_free) or 0

    def interval(self, shard: Shard, points: Points | None = None) -> Interval:
        """The interval to fit: the one after the intervals that the shard has points for.

        Args:
            shard: the prompts and what is fitted so far.
            points: with the guidance and the history of the interval; None: those of the run, and none.
        """
        guidance, history = (None, None) if points is None else (points.guidance, points.history)
        found = self.intervals(shard, (guidance,))[0]
        older = [found.drifts[0] - d for d in found.drifts[1:]]
        if not history or not older:
            return found
        width = float(found.sigmas[1] - found.sigmas[0])
        return replace(found, moved=width * torch.stack([h * d for h, d in zip(history, older, strict=False)]).sum(0))

    @torch.no_grad()  # not inference_mode, whose tensors cannot be part of an autograd graph
    def intervals(self, shard: Shard, scales: Sequence[float | None]) -> list[Interval]:
        """The interval to fit at each of several guidance scales; None stands for that of the run."""
        i = len(shard.fitted)
        student, start = self._begin(shard)
        self._advance(student, start)
        state = self._state(shard, start)
        target = self._target(student, start)
        student.drift.difference = state.difference
        found = []
        for scale in scales:
            drifts = (student.first(i, state, scale), *state.drifts[1:])
            slope = multistep(drifts[: shard.order])
            known = not student.analytic(i)
            here, ends = student.at(i, scale), student.sigmas[i : i + 2]
            found.append(Interval(here, ends, state.x, slope, target, drifts, known))
        return found

    @torch.no_grad()
    def fine(self, shard: Shard) -> FinePath:
        """The teacher's path on its fine grid."""
        student, start = self._begin(shard)
        return fine_path(student.drift, start, self.backbone.sigmas(shard.intervals), shard.teacher_steps)

    @torch.no_grad()
    def along(self, shard: Shard) -> list[State]:
        """The student at the start of each of the fitted intervals, from the beginning."""
        student, start = self._begin(shard)
        states = [student.begin(start)]
        for i in range(len(shard.fitted) - 1):
            states.append(student.step(i, states[-1]))
        return states

    def _begin(self, shard: Shard) -> tuple[Student, Tensor]:
        """The student of a shard, and the state at its first sigma."""
        encoded = self.backbone.encode(shard.prompts, self.guidance_scale)
        drift = self._drift = ConditionedDrift(self.backbone, encoded)
        sigmas = self.backbone.sigmas(shard.intervals)
        if places := shard.parts.places:
            sigmas = refine(sigmas, shard.teacher_steps)[list(places)]
        student = Student(shard, drift, sigmas, self.backbone.form, self.guidance_scale)
        return student, self.backbone.initial(noises(self.backbone, shard.noise_seeds))

    def _target(self, student: Student, start: Tensor) -> Tensor:
        """The teacher's state at the end of the interval to fit."""
        shard = student.shard
        places, steps = shard.parts.places, shard.teacher_steps
        key = (shard.prompts, shard.noise_seeds, shard.intervals, steps, places)
        if key not in self._kept:
            sigmas = self.backbone.sigmas(shard.intervals)
            self._keep(key, teacher_states(student.drift, start, sigmas, steps, places))
        self._kept.move_to_end(key)
        return self._kept[key][len(shard.fitted)].to(start)

    def _state(self, shard: Shard, start: Tensor) -> State:
        """The kept state of a shard, on the device of `start`."""
        x, *rest = (state.to(start) for state in self._kept[shard])
        count = min(shard.depth, 1 + len(shard.fitted))
        return State(x, tuple(rest[:count]), rest[count] if len(rest) > count else None)

    def _advance(self, student: Student, start: Tensor) -> None:
        """Compute and keep the student's states after the fitted intervals.

        The computation starts from the latest kept states of this student, which are dropped because nobody needs them
        again, or from the beginning if none are kept.
        """
        shard, goal = student.shard, len(student.shard.fitted)
        if shard in self._kept:
            self._kept.move_to_end(shard)
            return
        done = 0
        state: State | None = None
        for i in reversed(range(goal)):
            if (earlier := replace(shard, fitted=shard.fitted[:i])) in self._kept:
                done, state = i, self._state(earlier, start)
                del self._kept[earlier]
                break
        state = state or student.begin(start)
        for i in range(done, goal):
            state = student.step(i, state)
        self._keep(shard, state.tensors())

    def _keep(self, key: Hashable, states: tuple[Tensor, ...]) -> None:
        """Keep states; beyond KEPT_BYTES, those that were not used for the longest time are dropped."""
        self._kept[key] = tuple(state.cpu() for state in states)
        while len(self._kept) > 1 and sum(s.nbytes for kept in self._kept.values() for s in kept) > KEPT_BYTES:
            self._kept.popitem(last=False)
