"""A rival: a method of the zoo with all that can be chosen about it, and its text form in a configuration."""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin
from urllib.parse import parse_qsl

from epd_ray.errors import ConfigError, shown
from epd_ray.solvers import zoo
from epd_ray.solvers.schedule_names import MODEL, OWN

if TYPE_CHECKING:  # torch takes more than a second to import, and reading a configuration needs none of it
    from epd_ray.types import Form

Choice = bool | int | float | str | tuple[int, ...]
"""The value of a scheduler's option."""
STEP_OPTIONS = (
    *("solver_order", "solver_type", "lower_order_final", "euler_at_final", "disable_corrector", "predict_x0"),
)
"""Options that change a method's steps, as diffusers names them."""
GRID_OPTIONS = (
    *("timestep_spacing", "steps_offset", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("use_lu_lambdas", "final_sigmas_type", "shift_terminal", "interpolation_type"),
)
"""Options that change a method's own noise levels, as diffusers names them."""


@dataclass(frozen=True)
class Rival:
    """A method of the zoo with all that can be chosen about it; the defaults are the method as it comes.

    Its text form is METHOD[@SCHEDULE][?NAME=VALUE&...], such as "dpmpp2m@model?guidance_scale=2&solver_order=3". NAME
    is a field below, or an option of the method's diffusers scheduler; VALUE is a JSON value, or text.

    Attributes:
        method: a name of the zoo, or "module:attribute".
        schedule: "own" for the noise levels of the method's diffusers scheduler, "model" for those of the model's
            pipeline, or another name of epd_ray.solvers.schedule_names.
        guidance_scale: None takes that of the run.
        shift: the factor that shifts a flow's noise levels, above 0; None takes the pipeline's. Only with the schedules
            own and model.
        final_zero: whether the last sigma is 0; None as usual for the method.
        options: options of the scheduler, sorted by name.
    """

    method: str
    schedule: str = OWN
    guidance_scale: float | None = None
    shift: float | None = None
    final_zero: bool | None = None
    options: tuple[tuple[str, Choice], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Rival":
        """Read the text form.

        Raises:
            UnknownNameError: there is no such schedule.
            ConfigError: a value of the wrong kind.
        """
        method, schedule = zoo.split(text)
        given = {name: _value(value) for name, value in parse_qsl(text.partition("?")[2], keep_blank_values=True)}
        if "flow_shift" in given:  # as the multistep schedulers call it
            given["shift"] = given.pop("flow_shift")
        problems = [
            f"solver {shown(text)}: {name} is {shown(given[name])}, expected a number {bound}"
            for name, bound in (("guidance_scale", "of at least 0"), ("shift", "above 0"))
            if name in given and not _in_range(given[name], above_zero=name == "shift")
        ]
        if "final_zero" in given and not isinstance(given["final_zero"], bool):
            problems.append(f"solver {shown(text)}: final_zero is {shown(given['final_zero'])}, expected true or false")
        if problems:
            raise ConfigError(problems)
        own: dict[str, Any] = {n: given.pop(n) for n in ("guidance_scale", "shift", "final_zero") if n in given}
        return cls(method, schedule, **own, options=tuple(sorted(given.items())))

    @property
    def text(self) -> str:
        """The text form, which `parse` reads; what is left at its default is left out."""
        at = "" if self.schedule == OWN else f"@{self.schedule}"
        query = "&".join(f"{name}={_written(value)}" for name, value in self.chosen.items())
        return f"{self.method}{at}{'?' if query else ''}{query}"

    @property
    def chosen(self) -> dict[str, Choice]:
        """All that differs from the method as it comes, but for the schedule."""
        own = {"guidance_scale": self.guidance_scale, "shift": self.shift, "final_zero": self.final_zero}
        return {name: value for name, value in own.items() if value is not None} | dict(self.options)

    def having(self, **options: Choice) -> "Rival":
        """The same rival with other values of some of the scheduler's options."""
        return replace(self, options=tuple(sorted((dict(self.options) | options).items())))


def require_rivals(texts: Sequence[str], form: "Form") -> None:
    """Check that rivals fit the form of a model's ODE, and that their options exist in the installed diffusers.

    Args:
        texts: the text form of each rival.
        form: the form of the ODE, on which the scheduler of a method depends.

    Raises:
        ConfigError: a method, schedule or shift is for the other form; an option does not exist, with those that do; or
            its value is of another kind.
        UnknownNameError: there is no such method or schedule.
    """
    zoo.require_form(texts, form)
    problems = []
    for text in texts:
        rival = Rival.parse(text)
        if rival.shift is not None and (form != "flow" or rival.schedule not in (OWN, MODEL)):
            problems.append(f"solver {shown(text)}: shift is for a flow on the schedules own and model: leave it out")
        if rival.schedule != OWN and (unused := grid_options(dict(rival.options))):
            names = ", ".join(unused)
            problems.append(f"solver {shown(text)}: {names} is about schedule own, not {rival.schedule}: leave it out")
        known = options_of(rival.method, form)
        name = zoo.find(rival.method).schedulers.get(form)
        for option, value in rival.options:
            if option in known:
                if (kind := _misfit(known[option], value)) is not None:
                    problems.append(f"solver {shown(text)}: {option} is {shown(value)}, expected {kind}")
                continue
            has = f"it has {', '.join(known)}" if known else "it has none"
            whose = f"{name} of diffusers {_version()}" if name else "a method without a scheduler of diffusers"
            problems.append(f"solver {shown(text)}: {whose} has no option {shown(option)}, {has}")
    if problems:
        raise ConfigError(problems)


def options_of(method: str, form: "Form") -> dict[str, inspect.Parameter]:
    """The options of a method's scheduler in the installed diffusers that a rival may set; none without a scheduler."""
    found = zoo.find(method)
    name = found.schedulers.get(form)
    if name is None:
        return {}
    import diffusers

    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    allowed = (*STEP_OPTIONS, *GRID_OPTIONS) if found.takes_options else GRID_OPTIONS
    return {option: known[option] for option in allowed if option in known}


def told(name: str, value: Choice) -> str:
    """One choice for people, such as "guidance scale 2"."""
    return f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"


def step_options(options: Mapping[str, Choice]) -> dict[str, Any]:
    """Those options that change the steps, as diffusers takes them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if k in STEP_OPTIONS}


def grid_options(options: Mapping[str, Choice]) -> dict[str, Any]:
    """Those options that change the method's own noise levels."""
    return {k: v for k, v in options.items() if k in GRID_OPTIONS}


def _misfit(parameter: inspect.Parameter, value: Choice) -> str | None:
    """What a parameter takes, where a value is of another kind; None where it fits."""
    if parameter.name == "solver_order":
        return None if value in (1, 2, 3) and not isinstance(value, bool) else "1, 2 or 3"
    if get_origin(parameter.annotation) is Literal:
        choices = get_args(parameter.annotation)
        return None if value in choices else " or ".join(map(str, choices))
    if isinstance(parameter.default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(parameter.default, list):
        return None if isinstance(value, tuple) else "a list of steps such as [0,1]"
    return None


def _in_range(value: Choice, *, above_zero: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    return value > 0 if above_zero else value >= 0


def _value(text: str) -> Choice:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, list) and all(isinstance(v, int) for v in value):
        return tuple(value)
    return value if isinstance(value, (bool, int, float, str)) else text


def _written(value: Choice) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value, separators=(",", ":"))


def _version() -> str:
    import diffusers

    return str(diffusers.__version__)
