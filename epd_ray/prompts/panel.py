"""The panel of a run: its reward heads as a row of a prompt file sees them, and which of them judge it."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from epd_ray.errors import PromptError, shown
from epd_ray.registry import did_you_mean
from epd_ray.types import Metadata

SETTING = "prompts.heads"


@dataclass(frozen=True)
class Panel:
    """Reward heads, the columns that they read, and the column that says which of them judge a row.

    Attributes:
        weights: head -> its weight in the reward, >= 0, where a row does not name another one.
        needs: head -> the columns that it reads; heads that read none may be left out.
        column: the column that names the heads of a row, see `judges`; None where every head judges every row.
    """

    weights: Mapping[str, float]
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    column: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns that are read; none where there is no head."""
        routing = [self.column] if self.column is not None and self.weights else []
        return tuple(dict.fromkeys([*routing, *(name for needed in self.needs.values() for name in needed)]))

    def judges(self, row: Metadata) -> dict[str, float]:
        """The heads that judge a row, with their weights.

        Its cell in `column` is a text of names such as "clip, ocr:2", a list of names, or an object of names and
        weights. A name without a weight has that of the head; without a value, every head judges.

        Raises:
            ValueError: the cell is none of these, or names a head that there is not; the message goes on after the
                place of the row.
        """
        cell = None if self.column is None else row.get(self.column)
        if cell is None:
            return dict(self.weights)
        found: dict[str, float] = {}
        for name, weight in _named(cell):
            if name not in self.weights:
                raise ValueError(f"{self.column!r} names the head {shown(name)}{did_you_mean(name, self.weights)}")
            if name in found:
                raise ValueError(f"{self.column!r} names the head {shown(name)} twice: keep one of them")
            found[name] = self.weights[name] if weight is None else _weight(weight, name)
        return found

    def given(self, head: str, row: Metadata) -> dict[str, JsonValue] | None:
        """Those of the columns that a head reads which a row has; None where the head does not judge the row."""
        if head not in self.judges(row):
            return None
        return {name: row[name] for name in self.needs.get(head, ()) if name in row}

    def problem(self, row: Metadata) -> str | None:
        """Why the heads cannot judge a row, with the column, the head and the fix; None if they can."""
        try:
            judges = self.judges(row)
        except ValueError as error:
            return str(error)
        if not judges:
            return f"{self.column!r} names no head: name one, or leave the cell empty for all of them"
        for head in judges:
            for name in self.needs.get(head, ()):
                if name not in row:
                    fix = f"name other heads in {self.column!r}" if self.column else f"let {SETTING} name its heads"
                    return f"no column {name!r}, which the reward head {head!r} needs: fill it in, or {fix}"
        return None

    def require(self, row: Metadata, where: str) -> None:
        """Refuse a row that cannot be rewarded.

        Args:
            row: the columns of the row.
            where: the file and the line, for the message.

        Raises:
            PromptError: a head lacks a column, or no head with a weight above 0 judges the row.
        """
        problem = self.problem(row)
        if problem is None and not sum(self.judges(row).values()):
            problem = f"{self.column!r} names no head with a weight above 0, so there is no reward: name another one"
        if problem is not None:
            raise PromptError(f"{where}: {problem}")

    def require_use(self, rows: Iterable[Metadata], where: str) -> None:
        """Refuse rows among which there is none that some head judges.

        Args:
            rows: the columns of each row.
            where: the file or the split, for the message.

        Raises:
            PromptError: there is such a head.
        """
        if self.column is None:
            return
        judging = {head for row in rows for head in self.judges(row)}
        if idle := [head for head in self.weights if head not in judging]:
            fix = "shuffle the rows, give more of them, or leave the head out"
            raise PromptError(f"{where}: the reward head {idle[0]!r} judges no row ({fix})")


def _named(cell: JsonValue) -> list[tuple[str, JsonValue]]:
    """Names of heads with their weights; None where a name has none."""
    if isinstance(cell, str):
        parts = [part.partition(":") for part in re.split(r"[,;\s]+", cell) if part]
        return [(name, weight if colon else None) for name, colon, weight in parts]
    if isinstance(cell, dict):
        return list(cell.items())
    if isinstance(cell, list) and all(isinstance(name, str) for name in cell):
        return [(str(name), None) for name in cell]
    raise ValueError(f"the heads {shown(cell)} are neither text, nor a list of names, nor an object of weights")


def _weight(weight: JsonValue, name: str) -> float:
    try:
        found = float(weight) if isinstance(weight, str | int | float) and not isinstance(weight, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise ValueError(f"the weight {shown(weight)} of the head {shown(name)} is no number of at least 0")
    return found
