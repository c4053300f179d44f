"""Samplers: a method with its number of intervals and its schedule, ready to draw pictures with a backbone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epd_ray.errors import ModelError, ScheduleError, shown
from epd_ray.solvers import Solver, SolverTable, zoo
from epd_ray.solvers.conditioned import ConditionedDrift
from epd_ray.solvers.costs import Cost
from epd_ray.solvers.epd import analytic_drift, epd
from epd_ray.solvers.rival import Choice, Rival, grid_options, step_options, told
from epd_ray.solvers.schedule_names import AYS, IN_MODEL_TIME, MODEL, OWN, SCHEDULES, require_schedule
from epd_ray.solvers.schedules import spanning
from epd_ray.types import Backbone, Conditioning, Drift, Grid, Pipelined

EPD = "epd"
REFERENCE_STEPS = 50
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # the only one that the pipelines of flows come with
UNSAFE = re.compile(r"[^A-Za-z0-9_.]+")


@dataclass(frozen=True)
class Sampler:
    """A method with its number of intervals and its schedule; the method "epd" has a table.

    Attributes:
        kind: "epd", or the name of a method in epd_ray.solvers.zoo.
        intervals: N, at least 1.
        key: a name that is unique in a comparison and safe as a file name.
        label: the sampler's name in tables and plots.
        table: [N, K] or [B, N, K] for "epd"; None for any other method.
        afs: whether the first drift is analytical, which saves one evaluation.
        order: order of the multistep slope of "epd", 1 to 4.
        sigmas: [N+1], the sigmas of a saved solver; None takes those of `schedule`.
        schedule: "own" for the noise levels of the method's scheduler, "model" for the backbone's own schedule, or
            another name of epd_ray.solvers.schedule_names.
        final_zero: whether the last sigma is 0; None means as usual for the method, see `zoo.Method.ends_at_zero`.
        guidance_scale: the guidance scale; None takes that of whoever draws.
        shift: the factor that shifts a flow's noise levels; None takes the model's own.
        options: options of the method's diffusers scheduler, see epd_ray.solvers.rival.
    """

    kind: str
    intervals: int
    key: str
    label: str
    table: SolverTable | None = None
    afs: bool = False
    order: int = 1
    sigmas: tuple[float, ...] | None = None
    schedule: str = OWN
    final_zero: bool | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    options: tuple[tuple[str, Choice], ...] = ()

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
        """All evaluations of the drift."""
        return self.cost.model_evals

    def with_table(self, table: SolverTable) -> "Sampler":
        """The same sampler with another table."""
        return replace(self, table=table)

    def rows(self, start: int, stop: int) -> "Sampler":
        """The sampler for the samples from `start` to `stop` of a batch; only tables per sample make a difference."""
        if self.table is None or self.table.batch is None:
            return self
        return self.with_table(self.table.rows(start, stop))

    def steps(self, backbone: Backbone) -> Tensor:
        """The noise levels between the intervals, [N+1], float64, decreasing.

        Raises:
            ScheduleError: the schedule is not for this backbone.
        """
        return self.grid(backbone).sigmas

    def grid(self, backbone: Backbone) -> Grid:
        """The noise levels between the intervals, with the noise that the first one begins with.

        Raises:
            ScheduleError: the schedule, or what is chosen about it, is not for this backbone.
        """
        if self.sigmas is not None:
            return Grid(torch.tensor(self.sigmas, dtype=torch.float64))
        own = None if self.kind == EPD or self.schedule != OWN else zoo.find(self.kind).schedulers.get(backbone.form)
        changes = grid_options(dict(self.options))
        if self.shift is not None:
            if backbone.form != "flow" or not isinstance(backbone, Pipelined) or self.schedule not in (OWN, MODEL):
                raise ScheduleError(
                    f"shift is {self.shift:g}, but schedule {shown(self.schedule)} of model {shown(backbone.model_id)} "
                    "has none: leave shift out"
                )
            own, changes = own or FLOW_SCHEDULER, {**changes, "shift": self.shift}
        if isinstance(backbone, Pipelined):
            if self.schedule == AYS:
                return backbone.published_grid(AYS, self.intervals)
            if own is not None:
                zero = self.final_zero is not False and (self.ends_at_zero or own != FLOW_SCHEDULER)
                return backbone.scheduler_grid(own, self.intervals, final_zero=zero, changes=changes)
        if changes:
            raise ScheduleError(f"{', '.join(changes)} change the noise levels of {self.label} on schedule own alone")
        return Grid(scheduled(backbone, self.intervals, self.schedule, final_zero=self.ends_at_zero))

    def run(
        self, backbone: Backbone, conditioning: Conditioning, noise: Tensor, starts: "Alike | None" = None
    ) -> Tensor:
        """Solve the ODE from unit noise [B, ...] to latents [B, ...].

        Args:
            backbone: the frozen model.
            conditioning: B encoded prompts.
            noise: [B, ...], unit normal.
            starts: which rows have the same prompt and noise, so that "epd" evaluates their first drift only once.

        Raises:
            ConfigError: the method is for the other form of the ODE, or its package is missing.
            ScheduleError: the schedule is not for this backbone.
        """
        drift: Drift = ConditionedDrift(backbone, conditioning)
        grid = self.grid(backbone)
        sigmas, x = grid.sigmas, backbone.initial(noise)
        if grid.start is not None:  # in VE form `initial` scales the noise to the model's first level
            x = x * (grid.start / backbone.sigmas(1)[0].item())
        if self.table is not None:
            if starts is not None and not self.afs and not self.table.guides:
                drift = starts.begin(backbone, drift)
            return epd(drift, x, sigmas, self.table, afs=self.afs, order=self.order, form=backbone.form)
        if self.afs:  # all rows begin at one sigma
            drift = beginning_with(lambda x, sigma: analytic_drift(x, sigma[0].item(), backbone.form), drift)
        return zoo.follow(self.kind, drift, x, sigmas, backbone.form, options=step_options(dict(self.options)))


def baseline(name: str, parallel_nfe: int, *, final_zero: bool | None = None, afs: bool = False) -> Sampler:
    """A method of the zoo with as many intervals as a given parallel NFE allows.

    Args:
        name: a name of the zoo, an alias, or "module:function"; "heun@logsnr" also names the schedule.
        parallel_nfe: at least 1; the method must be able to have exactly this many.
        final_zero: whether the last sigma is 0; None means as usual for the method.
        afs: whether the first drift is analytical.

    Raises:
        UnknownNameError: there is no such method or schedule.
        ConfigError: the package that the method needs is missing.
        ValueError: the method cannot have this parallel NFE; the message names the nearest ones.
    """
    rival = Rival.parse(name)
    return rival_sampler(rival if final_zero is None else replace(rival, final_zero=final_zero), parallel_nfe, afs=afs)


def rival_sampler(rival: Rival, parallel_nfe: int, *, afs: bool = False) -> Sampler:
    """A rival with as many intervals as a given parallel NFE allows.

    Args:
        rival: the method and what is chosen about it.
        parallel_nfe: at least 1; the method must be able to have exactly this many.
        afs: whether the first drift is analytical.

    Raises:
        UnknownNameError: there is no such method.
        ConfigError: the package that the method needs is missing.
        ValueError: the method cannot have this parallel NFE; the message names the nearest ones.
    """
    name = kind = rival.method
    zoo.require_installed([name])
    schedule, final_zero, method = rival.schedule, rival.final_zero, zoo.find(name)
    intervals = method.intervals(parallel_nfe + afs)
    if method.cost(intervals, afs).parallel_nfe != parallel_nfe:
        near = {method.cost(n, afs).parallel_nfe for n in (max(1, intervals - 1), intervals)}
        possible = " or ".join(str(n) for n in sorted(near))
        raise ValueError(
            f"{name} has {method.evals} evaluations an interval, parallel NFE {parallel_nfe} is impossible "
            f"(take {possible})"
        )
    key, label = kind.replace(":", "."), method.label
    if schedule != OWN:
        key, label = f"{key}-{schedule}", f"{label} ({schedule})"
    if final_zero is False and method.ends_at_zero:
        key, label = f"{key}-no-zero", f"{label} without the step to 0"
    if afs:
        key, label = f"{key}-afs", f"{label}, analytical first step"
    if chosen := {name: value for name, value in rival.chosen.items() if name != "final_zero"}:
        written = replace(rival, final_zero=None, schedule=OWN).text.partition("?")[2]
        key = f"{key}-{UNSAFE.sub('-', written)}"
        label = f"{label} ({', '.join(map(told, chosen, chosen.values()))})"
    return Sampler(
        kind,
        intervals,
        f"{key}-{parallel_nfe}",
        label,
        afs=afs,
        schedule=schedule,
        final_zero=final_zero,
        guidance_scale=rival.guidance_scale,
        shift=rival.shift,
        options=rival.options,
    )


def nearest_baseline(name: str, parallel_nfe: int) -> Sampler:
    """A method of the zoo at the smallest parallel NFE, at least `parallel_nfe`, that it can have; see `baseline`."""
    return nearest_sampler(Rival.parse(name), parallel_nfe)


def nearest_sampler(rival: Rival, parallel_nfe: int) -> Sampler:
    """A rival at the smallest parallel NFE, at least `parallel_nfe`, that it can have; see `rival_sampler`."""
    method = zoo.find(rival.method)
    return rival_sampler(rival, method.parallel_nfe(method.intervals(parallel_nfe)))


def reference() -> Sampler:
    """The slow sampler that shows what many steps give: REFERENCE_STEPS steps of Euler."""
    return baseline("euler", REFERENCE_STEPS)


def scheduled(backbone: Backbone, intervals: int, schedule: str, *, final_zero: bool) -> Tensor:
    """Sigmas of a named schedule between the backbone's own ends.

    Args:
        backbone: its first sigma and its last sigma above 0 are the ends of the schedule.
        intervals: N.
        schedule: "model", "own", which is the same here, or a key of epd_ray.solvers.schedule_names.SCHEDULES.
        final_zero: whether a 0 follows after N sigmas of the schedule, as in diffusers' pipelines.

    Returns:
        [N+1], float64, decreasing.

    Raises:
        ScheduleError: the schedule is not for this backbone.
        UnknownNameError: there is no such schedule.
    """
    require_schedule(schedule)
    if schedule in (OWN, MODEL, backbone.schedule):
        return backbone.sigmas(intervals, final_zero=final_zero)
    if schedule not in (known := schedules_for(backbone)):
        raise ScheduleError(
            f"schedule {shown(schedule)} is not for model {shown(backbone.model_id)} (form {backbone.form}): "
            f"take {' or '.join(known)}"
        )
    high, low = backbone.sigmas(1).tolist()
    sigmas = spanning(schedule, intervals + (not final_zero), low, high)
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if final_zero else sigmas


def schedules_for(backbone: Backbone) -> list[str]:
    """The names of all schedules that a backbone can use; the first is "model", its own."""
    others = [name for name, form in SCHEDULES.items() if form == backbone.form and name not in IN_MODEL_TIME]
    return [MODEL, *(name for name in others if name != backbone.schedule)]


def learned(solver: Solver, key: str, label: str) -> Sampler:
    """The sampler that runs a saved solver."""
    sigmas = tuple(solver.sigmas.tolist())
    return Sampler(EPD, solver.table.intervals, key, label, solver.table, solver.afs, solver.order, sigmas)


def beginning_with(first: Drift, then: Drift) -> Drift:
    """A drift that is `first` in its first call and `then` in all later ones."""
    calls = 0

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return first(x, sigma) if calls == 1 else then(x, sigma)

    return drift


@dataclass(frozen=True)
class Alike:
    """The D < B distinct pairs of prompt and noise in a batch; rows with the same pair have the same first drift.

    Attributes:
        conditioning: the encoded prompts of the D pairs.
        rows: [D], the first row of the batch with each pair.
        kinds: [B], the index of each row's pair.
    """

    conditioning: Conditioning
    rows: tuple[int, ...]
    kinds: tuple[int, ...]

    def begin(self, backbone: Backbone, drift: Drift) -> Drift:
        """The same drift for a solver whose first call is at the start of the ODE; that call evaluates only D rows."""

        def shared(x: Tensor, sigma: Tensor) -> Tensor:
            rows = list(self.rows)
            return backbone.drift(x[rows], sigma[rows], self.conditioning)[list(self.kinds)]

        return beginning_with(shared, drift)


def alike(
    backbone: Backbone, prompts: Sequence[str], noise_seeds: Sequence[int], guidance_scale: float
) -> Alike | None:
    """Which rows of a batch have the same prompt and noise; None if no two of them have."""
    beginnings = list(zip(prompts, noise_seeds, strict=True))
    distinct = list(dict.fromkeys(beginnings))
    if len(distinct) == len(beginnings):
        return None
    conditioning = backbone.encode([prompt for prompt, _ in distinct], guidance_scale)
    rows, kinds = map(beginnings.index, distinct), map(distinct.index, beginnings)
    return Alike(conditioning, tuple(rows), tuple(kinds))


def finite_pictures(backbone: Backbone, latents: Tensor) -> Tensor:
    """The decoded pictures [B, 3, H, W], uint8, on the CPU.

    Args:
        backbone: the model that the latents are from.
        latents: [B, ...], the state at the end of the solver.

    Raises:
        ModelError: the network or the VAE gave values that are not finite, which would be drawn in black.
    """
    pictures = None
    if latents.isfinite().all():
        pictures = backbone.decode(latents)
        if pictures.isfinite().all():
            return to_uint8(pictures)
    part = "network" if pictures is None else "vae"
    raise ModelError(
        f"model {shown(backbone.model_id)}: its {part} gave values that are not finite in "
        f"{backbone.facts.get('dtype', 'float32')}: use dtype bfloat16 or float32; if it is float32, the weights are "
        "damaged or the solver does not fit"
    )


def to_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as uint8 on the CPU; rounded on their device, so that fewer bytes are copied."""
    return (images * 255).round().to(torch.uint8).cpu()
