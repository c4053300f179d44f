"""What the pipeline's call that is under way asks of its scheduler, and what a learned solver has to refuse there.

Diffusers never tells a scheduler which pipeline it is in, so this looks for the caller's variables.
"""

import inspect
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from epd_ray.errors import TableError
from epd_ray.solvers.stepwise import Plan

Windows = list[tuple[float, float]]
"""For each ControlNet the shares of all steps between which it acts."""


def asking_call(scheduler: object) -> Mapping[str, Any]:
    """The variables of the pipeline's method that is under way with this scheduler; empty outside of a pipeline."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        named = {kind.__name__ for kind in type(owner).__mro__}  # the import of the class would take seconds
        if "DiffusionPipeline" in named and getattr(owner, "scheduler", None) is scheduler:
            return frame.f_locals
        parts, state = frame.f_locals.get("components"), frame.f_locals.get("block_state")  # of a modular pipeline
        if state is not None and getattr(parts, "scheduler", None) is scheduler:
            return {**vars(state), "self": parts}
        frame = frame.f_back
    return {}


def default_steps(pipe: Any) -> int | None:
    """The number of steps that a pipeline takes if it is told none; None outside of a pipeline."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps") if pipe else None
    return None if parameter is None else parameter.default


def check_ends(pipe: Any, intervals: int) -> None:
    """Refuse a pipeline that shall leave the first or the last steps to another one.

    Raises:
        TableError: its denoising_start or denoising_end is given.
    """
    for name in ("denoising_start", "denoising_end"):
        if (given := getattr(pipe, name, None)) is not None:
            raise TableError(
                f"{name} is {given}, expected None: a learned solver does all its {intervals} intervals "
                f"(leave {name} out, or use another scheduler)"
            )


def control_windows(asking: Mapping[str, Any]) -> Windows:
    """The windows of a pipeline's ControlNets; none for any other pipeline."""
    starts, ends = (asking.get(f"control_guidance_{name}") for name in ("start", "end"))
    if starts is None or ends is None:
        return []
    pair = [[value] if isinstance(value, (int, float)) else value for value in (starts, ends)]
    return list(zip(*pair, strict=True))


def check_windows(windows: Windows, plan: Plan, begin: int) -> None:
    """Refuse a ControlNet that would act at some points of an interval and not at the others.

    Args:
        windows: of the pipeline's ControlNets.
        plan: the calls of the network.
        begin: the first call that is made.

    Raises:
        TableError: the message says where a window may begin or end.
    """
    calls = plan.calls[begin:]
    for start, end in windows:
        acts = [not (i / len(calls) < start or (i + 1) / len(calls) > end) for i in range(len(calls))]  # as pipelines
        for _, one in groupby(zip(calls, acts, strict=True), key=lambda pair: pair[0][0]):
            if len({acting for _, acting in one}) > 1:
                count = plan.solver.table.intervals - calls[0][0]
                raise TableError(
                    f"control_guidance_start and control_guidance_end are {start:g} and {end:g}, which parts the "
                    f"points of one interval (pass multiples of 1/{count}, or 0 and 1)"
                )


def first_call(asking: Mapping[str, Any], index: int, plan: Plan) -> int:
    """The first call of the network for a pipeline that begins from a noisy picture.

    Such a pipeline leaves out the first `order` calls for each interval that its `strength` leaves out.

    Args:
        asking: the variables of the pipeline's method that is under way.
        index: the number of calls that it leaves out.
        plan: the calls of the network.

    Returns:
        The index.

    Raises:
        TableError: the pipeline would begin elsewhere than at the start of the interval that is meant.
    """
    if index == 0 and asking.get("strength") in (None, 1):
        return 0
    intervals, order = plan.solver.table.intervals, plan.order
    steps = asking.get("num_inference_steps", intervals)
    if steps != intervals:
        if steps == len(plan.calls):  # it was counted by a pipeline that passes sigmas of its own
            raise TableError(
                f"{type(asking['self']).__name__} takes the {steps} calls of the network for intervals, of which this "
                f"solver has {intervals}, and would begin elsewhere than strength says (pass strength=1, use a solver "
                "with one evaluation an interval, or another scheduler)"
            )
        raise TableError(
            f"num_inference_steps is {steps}, expected {intervals}: strength counts the intervals of this solver "
            f"(pass num_inference_steps={intervals})"
        )
    if index >= len(plan.calls):
        raise TableError(
            f"strength leaves none of the solver's {intervals} intervals (pass strength at least {1 / intervals:.3g})"
        )
    if plan.solver.afs and index:
        raise TableError(
            "strength leaves out a first step that is analytical (pass strength=1, or use a solver without afs)"
        )
    if index and plan.calls[index] != (index // order, None):
        starts = [i for i, (_, part) in enumerate(plan.calls) if part is None]
        raise TableError(f"begin_index is {index}, expected {' or '.join(map(str, starts))}: the start of an interval")
    return index
