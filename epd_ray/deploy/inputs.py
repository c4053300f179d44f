"""The inputs of a pipeline's network, row by row."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from epd_ray.backbones.doors import Door

SHARED = frozenset({"txt_ids", "img_ids"})
"""Inputs of a network without a batch dimension, whatever their first size is."""


def by_name(door: Door, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a network's call by name; some pipelines pass the first two by position."""
    return dict(zip((door.hidden, "timestep"), args, strict=False)) | dict(kwargs)


def each_tensor(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """An argument of a network with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: each_tensor(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(each_tensor(item, change) for item in value)
    return value


def with_answer(output: Any, answer: Tensor) -> Any:
    """A network's output, a tuple or an object of diffusers, with another answer in it."""
    return (answer, *output[1:]) if isinstance(output, tuple) else type(output)(answer)
