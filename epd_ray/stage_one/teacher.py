"""The teacher of stage 1: DPM-Solver-2 with many small steps, whose states the student is to reach."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epd_ray.solvers import dpm2
from epd_ray.types import Drift


def teacher_states(
    drift: Drift, start: Tensor, sigmas: Tensor, steps: int, places: Sequence[int] = ()
) -> tuple[Tensor, ...]:
    """The teacher's state at the end of each interval, by DPM-Solver-2 with `steps` steps in each interval of sigmas.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        start: [B, ...], the state at sigmas[0].
        sigmas: [N+1], the model's schedule.
        steps: the number of steps in each of its intervals.
        places: where the student's intervals end, as indices of `refine(sigmas, steps)` from 0 on; empty stands for the
            schedule's own.
    """
    ends = set(places) or set(range(0, (len(sigmas) - 1) * steps + 1, steps))
    states: list[Tensor] = []

    def keep(step: int, sigma: float, x: Tensor) -> None:
        if step + 1 in ends:
            states.append(x.cpu())

    dpm2(drift, start, refine(sigmas, steps), callback=keep)
    return tuple(states)


@dataclass(frozen=True)
class FinePath:
    """The teacher's way through all its M steps.

    Attributes:
        sigmas: [M+1], float64.
        states: M + 1 states [B, ...], on the CPU.
        drifts: the drifts [B, ...] at the first M of them, on the CPU.
    """

    sigmas: Tensor
    states: tuple[Tensor, ...]
    drifts: tuple[Tensor, ...]


def fine_path(drift: Drift, start: Tensor, sigmas: Tensor, steps: int) -> FinePath:
    """The teacher's states and drifts at all its sigmas, with no evaluation beyond its own.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        start: [B, ...], the state at sigmas[0].
        sigmas: [N+1], the model's schedule.
        steps: the number of steps in each of its intervals.
    """
    fine = refine(sigmas, steps)
    states, seen = [start.cpu()], []

    def heard(x: Tensor, sigma: Tensor) -> Tensor:
        found = drift(x, sigma)
        seen.append(found.cpu())
        return found

    dpm2(heard, start, fine, callback=lambda step, sigma, x: states.append(x.cpu()))
    return FinePath(fine, tuple(states), tuple(seen[::2]))  # the first evaluation of a step is at its start


def refine(sigmas: Tensor, steps: int) -> Tensor:
    """Sigmas [N * steps + 1] that divide each interval of sigmas [N+1] into `steps` parts of equal width."""
    parts = torch.linspace(0, 1, steps + 1, dtype=sigmas.dtype)[:-1]
    inner = sigmas[:-1, None] + (sigmas[1:] - sigmas[:-1])[:, None] * parts
    return torch.cat([inner.flatten(), sigmas[-1:]])
