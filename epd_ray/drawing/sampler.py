"""Samplers by name: what a picture is drawn with, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epd_ray.errors import ScheduleError
from epd_ray.solvers import Solver, SolverTable, zoo
from epd_ray.solvers.conditioned import conditioned_drift
from epd_ray.solvers.costs import Cost
from epd_ray.solvers.epd import analytic_drift, epd
from epd_ray.solvers.schedules import IN_MODEL_TIME, MODEL, SCHEDULES, require_schedule, spanning
from epd_ray.types import Backbone, Conditioning, Drift

EPD = "epd"


@dataclass(frozen=True)
class Sampler:
    """A solver with its number of intervals; "epd" carries its table.

    Attributes:
        kind: "epd", or the name of a method in epd_ray.solvers.zoo.
        intervals: N, at least 1.
        key: unique in a comparison, safe as a file name.
        label: for people.
        table: [N, K] or [B, N, K] for "epd", else None.
        afs: analytical first step: one evaluation less.
        order: of the multistep slope ("epd": 1 to 4).
        sigmas: [N+1], where a saved solver brings its own; else by `schedule`.
        schedule: "model" for the backbone's own, or a name of epd_ray.solvers.schedules.SCHEDULES.
        final_zero: whether a method's last sigma is 0; None: as in the pipelines, see epd_ray.solvers.zoo.
    """

    kind: str
    intervals: int
    key: str
    label: str
    table: SolverTable | None = None
    afs: bool = False
    order: int = 1
    sigmas: tuple[float, ...] | None = None
    schedule: str = MODEL
    final_zero: bool | None = None

    @property
    def ends_at_zero(self) -> bool:
        """Whether the last sigma is 0."""
        if self.final_zero is not None:
            return self.final_zero
        return self.kind != EPD and zoo.find(self.kind).ends_at_zero

    @property
    def cost(self) -> Cost:
        """The evaluations of the drift that one picture takes."""
        return zoo.find(self.kind).cost(self.intervals, self.afs) if self.table is None else self.table.cost(self.afs)

    @property
    def parallel_nfe(self) -> int:
        """The longest chain of evaluations that wait for each other."""
        return self.cost.parallel_nfe

    @property
    def model_evals(self) -> int:
        """All evaluations of the drift; with classifier-free guidance each one is two passes of the network."""
        return self.cost.model_evals

    def with_table(self, table: SolverTable) -> "Sampler":
        """The same sampler with another table."""
        return replace(self, table=table)

    def rows(self, start: int, stop: int) -> "Sampler":
        """For a part of a batch's pictures: tables of their own are cut out with them."""
        if self.table is None or self.table.batch is None:
            return self
        return self.with_table(self.table.rows(start, stop))

    def run(
        self, backbone: Backbone, conditioning: Conditioning, noise: Tensor, starts: "Alike | None" = None
    ) -> Tensor:
        """From unit noise [B, ...] to latents [B, ...]; "epd" evaluates the start of rows that begin alike once.

        Raises:
            ConfigError: a method that does not follow the backbone's form, or whose package is missing.
            ScheduleError: a schedule that is not for this backbone.
        """
        drift = conditioned_drift(backbone, conditioning)
        if self.sigmas is not None:
            sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        else:
            sigmas = scheduled(backbone, self.intervals, self.schedule, final_zero=self.ends_at_zero)
        x = backbone.initial(noise)
        if self.table is not None:
            if starts is not None and not self.afs:
                drift = starts.begin(backbone, drift)
            return epd(drift, x, sigmas, self.table, afs=self.afs, order=self.order, form=backbone.form)
        if self.afs:  # all rows begin at one sigma
            drift = beginning_with(lambda x, sigma: analytic_drift(x, sigma[0].item(), backbone.form), drift)
        return zoo.follow(self.kind, drift, x, sigmas, backbone.form)


def baseline(name: str, parallel_nfe: int, *, final_zero: bool | None = None, afs: bool = False) -> Sampler:
    """A named method at a given sequential depth.

    Args:
        name: of the zoo, an alias, or "module:function"; "heun@logsnr" also names the schedule.
        parallel_nfe: at least 1, one that the method can have.
        final_zero: see Sampler.
        afs: see Sampler.

    Raises:
        UnknownNameError: no such method or schedule.
        ConfigError: its package is missing.
        ValueError: a depth that the method cannot have, with those that it can.
    """
    zoo.require_installed([name])
    (kind, schedule), method = zoo.split(name), zoo.find(name)
    intervals = method.intervals(parallel_nfe + afs)
    if method.cost(intervals, afs).parallel_nfe != parallel_nfe:
        near = {method.cost(n, afs).parallel_nfe for n in (max(1, intervals - 1), intervals)}
        possible = " or ".join(str(n) for n in sorted(near))
        raise ValueError(
            f"{name} has {method.evals} evaluations an interval, parallel NFE {parallel_nfe} is impossible "
            f"(take {possible})"
        )
    key, label = kind.replace(":", "."), method.label
    if schedule != MODEL:
        key, label = f"{key}-{schedule}", f"{label} ({schedule})"
    if final_zero is False and method.ends_at_zero:
        key, label = f"{key}-no-zero", f"{label} without the step to 0"
    if afs:
        key, label = f"{key}-afs", f"{label}, analytical first step"
    return Sampler(kind, intervals, f"{key}-{parallel_nfe}", label, afs=afs, schedule=schedule, final_zero=final_zero)


def nearest_baseline(name: str, parallel_nfe: int) -> Sampler:
    """A named method at the smallest sequential depth that it can have from `parallel_nfe` on; see `baseline`."""
    method = zoo.find(name)
    return baseline(name, method.parallel_nfe(method.intervals(parallel_nfe)))


def scheduled(backbone: Backbone, intervals: int, schedule: str, *, final_zero: bool) -> Tensor:
    """Sigmas of a named schedule between the backbone's own ends.

    Args:
        backbone: whose first and last sigmas above 0 they span.
        intervals: N.
        schedule: "model", or a name of epd_ray.solvers.schedules.SCHEDULES.
        final_zero: whether the last sigma is 0; N sigmas of the schedule come before it, as in the pipelines.

    Returns:
        [N+1], float64, decreasing.

    Raises:
        ScheduleError: a schedule that is not for this backbone.
        UnknownNameError: no such schedule.
    """
    require_schedule(schedule)
    if schedule in (MODEL, backbone.schedule):
        return backbone.sigmas(intervals, final_zero=final_zero)
    if schedule not in (known := schedules_for(backbone)):
        raise ScheduleError(
            f"schedule {schedule!r} is not for model {backbone.model_id!r} (form {backbone.form}): "
            f"take {' or '.join(known)}"
        )
    high, low = backbone.sigmas(1).tolist()
    sigmas = spanning(schedule, intervals + (not final_zero), low, high)
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if final_zero else sigmas


def schedules_for(backbone: Backbone) -> list[str]:
    """Every schedule that a backbone can be run on, its own first, as "model"."""
    others = [name for name, form in SCHEDULES.items() if form == backbone.form and name not in IN_MODEL_TIME]
    return [MODEL, *(name for name in others if name != backbone.schedule)]


def learned(solver: Solver, key: str, label: str) -> Sampler:
    """A sampler around a saved solver."""
    sigmas = tuple(solver.sigmas.tolist())
    return Sampler(EPD, solver.table.intervals, key, label, solver.table, solver.afs, solver.order, sigmas)


def beginning_with(first: Drift, then: Drift) -> Drift:
    """A drift whose first call is another's."""
    calls = 0

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return first(x, sigma) if calls == 1 else then(x, sigma)

    return drift


@dataclass(frozen=True)
class Alike:
    """The D < B distinct beginnings in a batch: rows of the same prompt and noise have the same first drift.

    Attributes:
        conditioning: of the D prompts.
        rows: [D], of the batch, the first of each.
        kinds: [B], which of the D each row is.
    """

    conditioning: Conditioning
    rows: tuple[int, ...]
    kinds: tuple[int, ...]

    def begin(self, backbone: Backbone, drift: Drift) -> Drift:
        """The same drift, for a solver whose first call is at the start: that one evaluates D rows."""

        def shared(x: Tensor, sigma: Tensor) -> Tensor:
            rows = list(self.rows)
            return backbone.drift(x[rows], sigma[rows], self.conditioning)[list(self.kinds)]

        return beginning_with(shared, drift)


def alike(
    backbone: Backbone, prompts: Sequence[str], noise_seeds: Sequence[int], guidance_scale: float
) -> Alike | None:
    """Which rows of a batch begin alike; None where no two of them do."""
    beginnings = list(zip(prompts, noise_seeds, strict=True))
    distinct = list(dict.fromkeys(beginnings))
    if len(distinct) == len(beginnings):
        return None
    conditioning = backbone.encode([prompt for prompt, _ in distinct], guidance_scale)
    rows, kinds = map(beginnings.index, distinct), map(distinct.index, beginnings)
    return Alike(conditioning, tuple(rows), tuple(kinds))


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> uint8, rounded, on the CPU; rounded where the images are, which is less to copy."""
    return (images * 255).round().to(torch.uint8).cpu()
