"""Sigmas inside an interval, and the largest sigma at which a flow model may be evaluated."""

from typing import TypeVar, overload

from torch import Tensor

from epd_ray.types import Form

FLOW_SIGMA_MAX = 1.0
"""Sigma of pure noise in flow form, where x = (1 - sigma) * clean + sigma * noise: no flow model knows a larger one."""

First = TypeVar("First", float, Tensor)


@overload
def inner_sigma(a: float, b: float, position: float) -> float: ...
@overload
def inner_sigma(a: Tensor | float, b: Tensor | float, position: Tensor) -> Tensor: ...
def inner_sigma(a: Tensor | float, b: Tensor | float, position: Tensor | float) -> Tensor | float:
    """The sigma at a position inside an interval, by a line in log sigma.

    Args:
        a: sigma at the interval's start, > 0.
        b: sigma at the interval's end, > 0.
        position: in [0, 1]; 0 is the start and 1 the end. Tensors are broadcast against each other.

    Returns:
        b ** position * a ** (1 - position).

    Source: EPD-Solver (arXiv 2507.14797).
    """
    return b**position * a ** (1 - position)


def largest_sigma(form: Form, first: First) -> First | None:
    """The largest sigma that a model has seen in a schedule; None in VE form, where time scales have no bound.

    Args:
        form: of the ODE.
        first: the schedule's first sigma, which is at most FLOW_SIGMA_MAX in flow form.
    """
    return first if form == "flow" else None


def bounded_time_scale(scale_time: Tensor, inner: Tensor, largest: Tensor | float | None) -> Tensor:
    """Time scales, lowered until each point is evaluated at `largest` at most.

    Args:
        scale_time: factors on the inner sigmas, > 0.
        inner: sigmas at the points' positions, > 0, of the same shape or one that broadcasts.
        largest: see `largest_sigma`; None leaves the scales as they are.

    Returns:
        The scales, in the dtype and on the device of `scale_time`; differentiable in both tensors.
    """
    return scale_time if largest is None else scale_time.minimum((largest / inner).to(scale_time))
