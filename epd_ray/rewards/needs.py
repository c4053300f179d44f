"""Which columns of a prompt's row a reward head reads: known from its class and options, before it is built."""

from collections.abc import Mapping, Sequence
from typing import Any

from epd_ray.errors import UnknownNameError
from epd_ray.rewards import HEADS
from epd_ray.types import Metadata, NeedsByOptions, ReadsRows, RewardHead


def needs_of(head: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that a head reads.

    Args:
        head: a name in the registry, or "module:Class".
        options: the keyword arguments of its constructor.

    Returns:
        The names; none for a class of the user that only the nodes of a cluster can import, where the head itself will
        say what it lacks.
    """
    try:
        kind: Any = HEADS.get(head)
    except UnknownNameError:
        return ()
    if isinstance(kind, NeedsByOptions):
        return tuple(kind.needs_with(options))
    return tuple(kind.needs) if isinstance(kind, ReadsRows) else ()


def needed_by(head: RewardHead) -> tuple[str, ...]:
    """The columns that a head which is built reads."""
    return head.needs if isinstance(head, ReadsRows) else ()


def missing(needs: Sequence[str], rows: Sequence[Metadata | None] | None, count: int) -> str | None:
    """Why a head cannot score a batch whose rows lack a column; None if none does.

    Args:
        needs: the columns that the head reads.
        rows: the columns of each row; None where there are none, or for a row that the head does not judge.
        count: the number of rows.
    """
    given: Sequence[Metadata | None] = [{}] * count if rows is None else rows
    lacking = (name for name in needs for row in given if row is not None and name not in row)
    name = next(lacking, None)
    return None if name is None else f"needs the column {name!r}, which a row lacks: give prompts with that column"
