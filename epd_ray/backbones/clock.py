"""How a pipeline tells its network the time, found by watching its calls, so that each row can be told its own.

Pipelines hand their network one number for the whole batch, made from the scheduler's timestep t: t itself, t / 1000,
1 - t / 1000. All of them are a * t + b, so three timesteps show which arguments follow t, with which a and b, and
whether it is so.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from epd_ray.errors import ModelError

PROBES = (1.0, 0.5, 0.25)  # of the training's timesteps: exact even where a pipeline rounds to bfloat16
TOLERANCE = 1e-4
ADAPTER = 'write an adapter for it, see "How to add a model family" in the guide'


@dataclass(frozen=True)
class Seen:
    """A call of a network: its arguments by name, and the number of rows of its latents, which come first."""

    arguments: dict[str, Any]
    rows: int


def bind(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call of a network by their names."""
    signature = inspect.signature(type(network).forward)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    return signature.bind(*args, **kwargs)


def rows_of(arguments: dict[str, Any]) -> int:
    """The number of rows of a network's latents, a tensor [R, ...] or a list of R tensors."""
    return len(next(iter(arguments.values())))


@dataclass(frozen=True)
class Clock:
    """What is known of a network's calls.

    Attributes:
        arguments: for each argument that follows the timestep t, its name, a and b: its value is a * t + b.
        output: what the network returned for `rows` rows.
        rows: the rows of the call that `output` is from.
    """

    arguments: tuple[tuple[str, float, float], ...]
    output: Any
    rows: int

    def tell(self, arguments: dict[str, Any], timestep: Tensor) -> None:
        """Put each row's own time into the arguments of a call; where guidance repeats the batch, the times follow."""
        rows = rows_of(arguments)
        t = timestep.repeat(rows // len(timestep))  # [R]
        for name, a, b in self.arguments:
            given, value = arguments[name], (a * t + b).float()
            if isinstance(given, Tensor):
                value = value.to(given.device)
                if given.ndim > 1:  # a number for each token
                    value = value.reshape(-1, *[1] * (given.ndim - 1)).expand(rows, *given.shape[1:])
            arguments[name] = value

    def blank(self, arguments: dict[str, Any]) -> Any:
        """Zeros in the shape of the network's output, for a step whose output nobody reads."""
        return _zeros(self.output, self.rows, rows_of(arguments))


def _zeros(output: Any, rows: int, wanted: int) -> Any:
    if isinstance(output, Tensor):
        return output.new_zeros(wanted, *output.shape[1:]) if len(output) == rows else torch.zeros_like(output)
    if isinstance(output, list) and len(output) == rows:  # one picture each
        return [torch.zeros_like(output[0]) for _ in range(wanted)]
    if isinstance(output, (list, tuple)):
        return type(output)(_zeros(part, rows, wanted) for part in output)
    if isinstance(output, dict):  # also diffusers' own classes of outputs
        return type(output)(**{name: _zeros(part, rows, wanted) for name, part in output.items()})
    return output


def read_clock(
    model: str, batch: int, probes: Sequence[Sequence[Seen]], timesteps: Sequence[float], output: Any, rows: int
) -> Clock:
    """Find how a network is told the time.

    Args:
        model: name of the model, for messages.
        batch: B, the number of pictures; no two of them have the same latents.
        probes: the network's calls in a step at each of the three timesteps; all else was the same.
        timesteps: the three timesteps.
        output: what the network returned in another call.
        rows: the rows of that call.

    Raises:
        ModelError: the message says which fact is missing.
    """
    found = [
        _following(model, [seen.arguments for seen in calls], timesteps) for calls in zip(*probes, strict=True)
    ]  # fmt: skip
    if not found or not all(found):
        raise ModelError(f"{model}: no argument of its network follows the scheduler's timestep: {ADAPTER}")
    if any(arguments != found[0] for arguments in found):
        raise ModelError(f"{model}: its network is told the time in several ways within a step: {ADAPTER}")
    for seen in probes[0]:
        _check_rows(model, batch, seen)
    return Clock(tuple(found[0]), output, rows)


def _following(
    model: str, calls: Sequence[dict[str, Any]], timesteps: Sequence[float]
) -> list[tuple[str, float, float]]:
    """The arguments of a call that follow the timestep, each with its a and b."""
    found = []
    for name in calls[0]:
        given = [call[name] for call in calls]
        if all(_same(value, given[0]) for value in given[1:]):
            continue
        numbers = [_number(value) for value in given]
        if None in numbers:
            raise ModelError(f"{model}: argument {name} of its network changes with time and is no number: {ADAPTER}")
        (t0, t1, t2), (v0, v1, v2) = timesteps, numbers
        a = (v0 - v1) / (t0 - t1)  # type: ignore[operator]
        b = v0 - a * t0  # type: ignore[operator]
        if abs(a * t2 + b - v2) > TOLERANCE * max(abs(v0), abs(v1), abs(v2)):  # type: ignore[arg-type,operator]
            raise ModelError(
                f"{model}: argument {name} of its network is {v0:g}, {v1:g} and {v2:g} at timesteps {t0:g}, {t1:g} and "
                f"{t2:g}, which is not a * t + b: {ADAPTER}"
            )
        found.append((name, a, b))
    return found


def _same(first: Any, second: Any) -> bool:
    ours, theirs = pytree.tree_leaves(first), pytree.tree_leaves(second)
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return type(first) is type(second) and bool(first is second or first == second)


def _number(value: Any) -> float | None:
    """The one number in all entries of a value; None if there is none."""
    if isinstance(value, Tensor):
        first = value.flatten()[0]
        return float(first) if bool((value == first).all()) else None
    return float(value) if isinstance(value, (int, float)) else None


def _check_rows(model: str, batch: int, seen: Seen) -> None:
    """Refuse a network whose rows are not the pictures in their order, or that order several times."""
    latents = next(iter(seen.arguments.values()))
    whole = seen.rows % batch == 0
    blocks = [list(latents[i : i + batch]) for i in range(0, seen.rows, batch)] if whole else []
    if not whole or any(not torch.equal(a, b) for block in blocks for a, b in zip(blocks[0], block, strict=True)):
        raise ModelError(f"{model}: the rows of its network are not its pictures in their order: {ADAPTER}")
    if batch > 1 and torch.equal(blocks[0][0], blocks[0][1]):
        raise ModelError(f"{model}: the first argument of its network is not its latents: {ADAPTER}")
