"""Columns of the prompts' rows, for heads that ask about more than the prompt."""

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from epd_ray.errors import RewardError


def read_column(
    head: str, name: str, prompts: Sequence[str], rows: Sequence[Mapping[str, JsonValue]] | None
) -> list[JsonValue]:
    """The values of one column, one for each of B prompts.

    Args:
        head: name of the reward head, for error messages.
        name: name of the column.
        prompts: B texts, for error messages.
        rows: the prompts' rows; None where there are none.

    Raises:
        RewardError: there are no rows, or a row has nothing in this column.
    """
    if rows is None:
        raise RewardError(head, f"needs the column {name!r} of each prompt's row: give a prompt file that has it")
    values = [row.get(name) for row in rows]
    lacking = [prompt for prompt, value in zip(prompts, values, strict=True) if value in (None, "", [])]
    if lacking:
        raise RewardError(
            head, f"the column {name!r} is empty for {len(lacking)} prompts, such as {lacking[0][:60]!r}: fill it in"
        )
    return values
