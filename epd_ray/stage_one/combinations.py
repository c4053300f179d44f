"""The number of combinations of grid positions that least squares tries for an interval, and its bound."""

from bisect import bisect_right
from math import comb

MAX_COMBINATIONS = 200_000
"""With so many an interval's fit takes about a minute: 0.2 to 0.3 ms per combination with direction scales."""


def too_many_combinations(grid: int, points: int, start_point: bool) -> str | None:
    """An error message if least squares would try too many combinations of positions, otherwise None.

    Args:
        grid: number of positions that a point may have.
        points: K, the number of points per interval.
        start_point: whether the first point stays at the interval's start.
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
