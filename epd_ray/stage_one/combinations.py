"""How many combinations of grid positions stage 1 fits an interval by, and how many are too many."""

from bisect import bisect_right
from math import comb

MAX_COMBINATIONS = 200_000
"""An interval's fit takes about a minute with so many: 0.2 to 0.3 ms for each where it has direction scales."""


def too_many_combinations(grid: int, points: int, start_point: bool) -> str | None:
    """What is wrong where least squares would try too many combinations of positions, else None.

    Args:
        grid: positions that it tries.
        points: K.
        start_point: whether the first of them stays where it is.
    """
    moving = points - start_point
    count = comb(grid, moving)
    if count <= MAX_COMBINATIONS:
        return None
    most = bisect_right(range(grid), MAX_COMBINATIONS, key=lambda positions: comb(positions, moving)) - 1
    return (
        f"grid is {grid}: least squares would fit {count:,} combinations of {moving} positions per interval, at most "
        f"{MAX_COMBINATIONS:,} are possible (set distill.grid to {most} or less, or lower solver.points)"
    )
