"""The methods that a learned table is compared with: their costs and where they apply. Each loads when first run."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from epd_ray.errors import ConfigError, shown
from epd_ray.registry import Registry
from epd_ray.solvers.costs import Cost, fewest_intervals, sequential_cost
from epd_ray.solvers.schedule_names import AYS, MODEL, OWN, SCHEDULES, require_schedule

if TYPE_CHECKING:  # torch takes more than a second to import, and checking names needs none of it
    from torch import Tensor

    from epd_ray.solvers.epd import Callback
    from epd_ray.types import Drift, Form

NATIVE, SCHEDULERS = "epd_ray.solvers.baselines", "epd_ray.solvers.schedulers"
STRUCTURED, RUNGE_KUTTA = "epd_ray.solvers.skrample:structured", "epd_ray.solvers.skrample:runge_kutta"


@dataclass(frozen=True)
class Method:
    """A method and its facts.

    Attributes:
        label: the method's name in tables and plots.
        target: "module:function" of `solve(drift, x, sigmas, *, callback=None)`.
        options: further keyword arguments of that function.
        evals: evaluations of the drift per interval, all of which wait for each other.
        last_evals: evaluations in the last interval; None means `evals`.
        ends_at_zero: whether the last sigma is 0, as in diffusers' pipelines, or above 0.
        forms: forms of the ODE that the method can solve.
        needs_form: whether the function takes the keyword argument `form`.
        extra: the optional dependency of this package that the method needs, named after the module that it imports.
        schedulers: a form of the ODE -> the diffusers class with which pipelines of this form run the method, and whose
            noise levels are the method's own; a form that is missing has none, and the model's own levels serve.
        takes_options: whether the function takes the keyword argument `options`, options of that class.
    """

    label: str
    target: str
    options: Mapping[str, int | str] = field(default_factory=dict)
    evals: int = 1
    last_evals: int | None = None
    ends_at_zero: bool = False
    forms: "tuple[Form, ...]" = ("ve", "flow")
    needs_form: bool = False
    extra: str | None = None
    schedulers: "Mapping[Form, str]" = field(default_factory=dict)
    takes_options: bool = False

    def cost(self, intervals: int, afs: bool = False) -> Cost:
        """Evaluations of the drift per picture over N intervals; `afs` says whether the first drift is analytical."""
        return sequential_cost(intervals, self.evals, self.last_evals, afs=afs)

    def parallel_nfe(self, intervals: int) -> int:
        """Evaluations over N intervals, all of which wait for each other."""
        return self.cost(intervals).parallel_nfe

    def intervals(self, parallel_nfe: int) -> int:
        """The smallest number of intervals, at least 1, that takes at least `parallel_nfe` evaluations."""
        return fewest_intervals(parallel_nfe, self.evals, self.last_evals)

    @property
    def installed(self) -> bool:
        """Whether the optional dependency is installed; true for a method without one."""
        return self.extra is None or importlib.util.find_spec(self.extra) is not None


def _scheduler(label: str, function: str, order: int, scheduler: str, forms: "tuple[Form, ...]") -> Method:
    return Method(
        label,
        f"{SCHEDULERS}:{function}",
        {"order": order},
        ends_at_zero=function != "deis",
        needs_form=True,
        schedulers=dict.fromkeys(forms, scheduler),
        takes_options=True,
    )


def _structured(sampler: str, order: int) -> Method:
    options: dict[str, int | str] = {"sampler": sampler, "order": order}
    label = f"skrample {sampler} (order {order})"
    return Method(label, STRUCTURED, options, ends_at_zero=True, needs_form=True, extra="skrample")


def _runge_kutta(order: int) -> Method:
    label = f"skrample Runge-Kutta (order {order})"
    return Method(label, RUNGE_KUTTA, {"order": order}, evals=order, needs_form=True, extra="skrample")


# What runs a method in the pipelines of each form. IPNDMScheduler tells a network times from 0 to 1, which none of the
# models here understands, and KDPM2DiscreteScheduler knows no flow. DEISMultistepScheduler repeats a flow's last sigma,
# so that its pictures stay noisy. HeunDiscreteScheduler and KDPM2DiscreteScheduler end with an Euler step to 0.
EULER: "dict[Form, str]" = {"ve": "EulerDiscreteScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}
HEUN: "dict[Form, str]" = {"ve": "HeunDiscreteScheduler", "flow": "FlowMatchHeunDiscreteScheduler"}
KDPM2: "dict[Form, str]" = {"ve": "KDPM2DiscreteScheduler"}
BOTH: "tuple[Form, ...]" = ("ve", "flow")
DPMPP, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"

METHODS: dict[str, Method] = {
    "euler": Method("DDIM / Euler", f"{NATIVE}:euler", ends_at_zero=True, schedulers=EULER),
    # The last step of the pipelines, from a small sigma to 0, changes almost nothing. EPD has no such step, so it is
    # also compared with an Euler method that has none.
    "euler_no_zero": Method("DDIM / Euler without the step to 0", f"{NATIVE}:euler"),
    "heun": Method("Heun", f"{NATIVE}:heun", evals=2),
    "edm": Method("EDM", f"{NATIVE}:edm", evals=2, last_evals=1, ends_at_zero=True, schedulers=HEUN),
    "dpm2": Method("DPM-Solver-2", f"{NATIVE}:dpm2", evals=2),
    "kdpm2": Method("KDPM2", f"{NATIVE}:kdpm2", evals=2, last_evals=1, ends_at_zero=True, schedulers=KDPM2),
    "ipndm": Method("iPNDM", f"{NATIVE}:ipndm", ends_at_zero=True),
    "ipndm2": Method("iPNDM (order 2)", f"{NATIVE}:ipndm", {"order": 2}, ends_at_zero=True),
    "ipndm3": Method("iPNDM (order 3)", f"{NATIVE}:ipndm", {"order": 3}, ends_at_zero=True),
    "dpmpp2m": _scheduler("DPM-Solver++ 2M", "dpmpp", 2, DPMPP, BOTH),
    "dpmpp3m": _scheduler("DPM-Solver++ 3M", "dpmpp", 3, DPMPP, BOTH),
    "unipc": _scheduler("UniPC", "unipc", 2, UNIPC, BOTH),
    "unipc3": _scheduler("UniPC (order 3)", "unipc", 3, UNIPC, BOTH),
    "deis": _scheduler("DEIS", "deis", 2, DEIS, ("ve",)),
    "deis3": _scheduler("DEIS (order 3)", "deis", 3, DEIS, ("ve",)),
    **{f"skrample_dpm{n}": _structured("DPM", n) for n in (2, 3)},
    **{f"skrample_adams{n}": _structured("Adams", n) for n in (2, 3, 4)},
    **{f"skrample_unip{n}": _structured("UniP", n) for n in (2, 3)},
    **{f"skrample_unipc{n}": _structured("UniPC", n) for n in (2, 3)},
    **{f"skrample_rk{n}": _runge_kutta(n) for n in (2, 3, 4)},
}

ALIASES = {"ddim": "euler", "ipndm1": "euler", "ipndm4": "ipndm", "unipc2": "unipc", "deis2": "deis"}
"""Other names of the same methods; a comparison draws each method only once."""

SOLVERS: "Registry[Tensor]" = Registry(
    "solver", {name: METHODS[ALIASES.get(name, name)].target for name in (*METHODS, *ALIASES)}
)


def split(name: str) -> tuple[str, str]:
    """The method and the schedule of a name such as "heun@logsnr"; without "@" the schedule is the method's own.

    What stands after a "?" is ignored, see `Rival.parse`.

    Raises:
        UnknownNameError: there is no such schedule.
    """
    method, at, schedule = name.partition("?")[0].partition("@")
    if at:
        require_schedule(schedule)
    return ALIASES.get(method, method), schedule or OWN


def find(name: str) -> Method:
    """The method behind a name, an alias, or "module:attribute"; a schedule after "@" is ignored.

    The attribute is a Method, or a function, which stands for a method with one evaluation per interval, any form and a
    last sigma above 0.

    Raises:
        UnknownNameError: there is no such method or schedule.
    """
    name, _ = split(name)
    if name in METHODS:
        return METHODS[name]
    found: object = SOLVERS.get(name)
    return found if isinstance(found, Method) else Method(name.rpartition(":")[2], name)


def applicable(form: "Form", *, installed: bool = True) -> list[str]:
    """The names of all methods that can solve a form of the ODE, without aliases.

    Args:
        form: how noise enters x, "ve" or "flow".
        installed: whether methods whose package is not installed are left out.
    """
    return [name for name, m in METHODS.items() if form in m.forms and (m.installed or not installed)]


def require_installed(names: Sequence[str]) -> None:
    """Check that the packages that some methods need are installed.

    Raises:
        ConfigError: a package is missing.
        UnknownNameError: there is no such method.
    """
    missing = {name: method.extra for name in names if not (method := find(name)).installed}
    if missing:
        raise ConfigError(
            [
                f"solver {shown(name)}: the package {extra} is not installed: pip install 'epd-ray[{extra}]'"
                for name, extra in missing.items()
            ]
        )


def require_form(names: Sequence[str], form: "Form") -> None:
    """Check that methods and their schedules fit the form of a model's ODE.

    Raises:
        ConfigError: a method or schedule is for the other form.
        UnknownNameError: there is no such method or schedule.
    """
    problems = []
    for name in names:
        _, schedule = split(name)
        forms = find(name).forms if schedule in (OWN, MODEL) else ("ve",) if schedule == AYS else (SCHEDULES[schedule],)
        if form not in forms:
            problems.append(f"solver {shown(name)} follows the form {' or '.join(forms)}, but this model's is {form}")
    if problems:
        raise ConfigError(problems)


def follow(
    name: str,
    drift: "Drift",
    x: "Tensor",
    sigmas: "Tensor",
    form: "Form",
    *,
    options: Mapping[str, Any] | None = None,
    callback: "Callback | None" = None,
) -> "Tensor":
    """Solve the ODE with a method.

    Args:
        name: a name, an alias, or "module:attribute", see `find`.
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, >= 0; > 0 for a method that does not end at 0.
        form: how noise enters x, "ve" or "flow".
        options: options of the method's scheduler that change its steps; only for a method that takes them.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ConfigError: the method is for the other form, or its package is missing.
        ScheduleError: the method cannot use these sigmas.
        UnknownNameError: there is no such method.
    """
    method = find(name)
    require_form([name], form)
    require_installed([name])
    solve = SOLVERS.get(method.target)
    extra: dict[str, Any] = {"form": form} if method.needs_form else {}
    if options:
        extra["options"] = options
    return solve(drift, x, sigmas, callback=callback, **method.options, **extra)
