"""Marks out of the text that a judge answers: strictly, because a wrong mark would be learned from."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from epd_ray.rewards.client import one_line

Form = Literal["number", "json"]
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
FENCE = re.compile(r"\A```[A-Za-z]*[ \t]*\n(.*)\n[ \t]*```\Z", re.DOTALL)
"""A fence of Markdown around the whole answer, as chat models put around JSON unasked."""


class UnreadableAnswerError(Exception):
    """An answer that holds no mark; the message is one line with the answer's beginning."""


@dataclass(frozen=True)
class Marks:
    """How a judge gives its marks.

    Attributes:
        form: "number" for an answer that is a number alone, "json" for an object with the number under `key`.
        key: the key of the number in an answer of form "json".
        low: the lowest mark, which counts as 0.
        high: the highest mark, which counts as 1; above `low`.
    """

    form: Form
    key: str
    low: float
    high: float

    def score(self, answer: str) -> float:
        """The score in [0, 1] that an answer gives.

        Raises:
            UnreadableAnswerError: the answer has another form, or its mark is out of bounds.
        """
        text = answer.strip()
        fenced = FENCE.match(text)
        text = fenced[1].strip() if fenced else text
        mark = self._from_json(text) if self.form == "json" else self._from_number(text)
        if not self.low <= mark <= self.high:
            raise UnreadableAnswerError(f"gave the mark {mark:g}, expected {self.low:g} to {self.high:g}")
        return (mark - self.low) / (self.high - self.low)

    def _from_number(self, text: str) -> float:
        if len(text) > 40 or not NUMBER.fullmatch(text):
            fix = "let the template ask for the number alone, or set answer to json"
            raise UnreadableAnswerError(f"answered {_beginning(text)}, which is not a number: {fix}")
        return float(text)

    def _from_json(self, text: str) -> float:
        expected = f"let the template ask for JSON alone, with a number under {self.key!r}"
        try:
            found = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            raise UnreadableAnswerError(f"answered {_beginning(text)}, which is not JSON: {expected}") from None
        mark = found.get(self.key) if isinstance(found, Mapping) else None
        if isinstance(mark, bool) or not isinstance(mark, int | float):
            raise UnreadableAnswerError(f"answered {_beginning(text)}, without the number: {expected}")
        return float(mark) if abs(mark) < 1e300 else float("nan")  # which is out of any bounds


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _beginning(text: str) -> str:
    return f"({one_line(text)})" if text else "nothing"
