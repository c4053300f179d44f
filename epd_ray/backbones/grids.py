"""The noise levels of other schedulers than a pipeline's own, made as diffusers' documentation says: by `from_config`.

Diffusers is imported inside the functions, because that takes seconds.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epd_ray.errors import ScheduleError, is_own_bug, shown
from epd_ray.types import Form, Grid


def scheduler_grid(
    own: Any,
    scheduler: str,
    num_intervals: int,
    *,
    form: Form,
    final_zero: bool,
    shift: float | None,
    changes: Mapping[str, Any],
) -> Grid:
    """The noise levels of a scheduler that takes the place of a pipeline's own one.

    A scheduler whose state has unit variance (VP form) begins with it; the others begin as they say themselves.

    Args:
        own: the pipeline's scheduler; it is not changed.
        scheduler: the name of a diffusers class.
        num_intervals: N.
        form: how noise enters x, "ve" or "flow".
        final_zero: whether a 0 at the end is kept; else the levels are those of N + 1 steps without it.
        shift: the factor of a flow; None in VE form.
        changes: further arguments of `from_config`.

    Raises:
        ScheduleError: the scheduler does not make N + 1 decreasing levels, or refuses an argument.
    """
    import diffusers

    kind = getattr(diffusers, scheduler)
    flow = {} if form == "ve" else _of_flow(kind, shift)
    try:
        other = kind.from_config(own.config, **flow, **{k: _plain(v) for k, v in changes.items() if k != "shift"})
        other.set_timesteps(num_intervals if final_zero else num_intervals + 1)
    except (ValueError, TypeError, NotImplementedError, IndexError, ImportError) as error:
        if is_own_bug(error):
            raise
        said = " ".join(str(error).split())
        raise ScheduleError(f"{scheduler} cannot be set so ({said}): change its options") from error
    sigmas = distinct(other.sigmas.double())
    if not final_zero:
        sigmas = sigmas[:-1]
    if len(sigmas) != num_intervals + 1 or not bool((sigmas.diff() < 0).all()):
        raise ScheduleError(
            f"{scheduler} makes {len(sigmas)} noise levels that do not all decrease, expected {num_intervals + 1}: "
            "change its options or the number of intervals"
        )
    if form == "flow":
        return Grid(sigmas)
    return Grid(sigmas, (1 + sigmas[0].item() ** 2) ** 0.5 if _unit_variance(other) else float(other.init_noise_sigma))


def distinct(sigmas: Tensor) -> Tensor:
    """The levels [M] without those that follow an equal one: schedulers of two evaluations hold inner levels twice."""
    return sigmas[torch.cat([torch.ones(1, dtype=torch.bool), sigmas.diff() != 0])]


def _of_flow(kind: Any, shift: float | None) -> dict[str, Any]:
    """The arguments by which a scheduler follows a flow. The shift is fixed: a dynamic one is resolved before."""
    import inspect

    known = inspect.signature(kind.__init__).parameters
    found: dict[str, Any] = {"flow_shift" if "flow_shift" in known else "shift": shift}
    given = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": False}
    return found | {name: value for name, value in given.items() if name in known}


def _unit_variance(scheduler: Any) -> bool:
    return isinstance(scheduler.init_noise_sigma, float) and scheduler.init_noise_sigma == 1.0


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def published_grid(table: str | None, num_intervals: int, model: str) -> Grid:
    """The sigmas of Align Your Steps, interpolated in log sigma to N intervals, with the 0 at their end.

    Args:
        table: the model's key in `diffusers.schedulers.AysSchedules`, without "Sigmas"; None: it has none.
        num_intervals: N.
        model: name of the model, for messages.

    Raises:
        ScheduleError: nothing is published for this model.

    Source: Align Your Steps (arXiv 2404.14507), with its interpolation for other numbers of steps.
    """
    if table is None:
        raise ScheduleError(f"schedule 'ays' is not published for model {shown(model)}: take own or model")
    from diffusers.schedulers import AysSchedules

    known = torch.tensor(AysSchedules[f"{table}Sigmas"][:-1], dtype=torch.float64)
    place = torch.linspace(0, len(known) - 1, num_intervals, dtype=torch.float64)
    low = place.floor().clamp(max=len(known) - 2).long()
    logs = known.log()
    sigmas = (logs[low] + (place - low) * (logs[low + 1] - logs[low])).exp()
    return Grid(torch.cat([sigmas, sigmas.new_zeros(1)]), (1 + known[0].item() ** 2) ** 0.5)
