"""Rollouts and metrics of finished iterations that are lost, and the checkpoint from which they are made again.

The policy of an iteration is known from the checkpoints alone. So what is lost after the oldest of them comes back when
the run goes on from there, the same to the bit; what is older stays lost, and no result depends on it.
"""

import logging
from collections.abc import Collection, Iterable, Sequence

from epd_ray.errors import RunDirectoryError
from epd_ray.runs.state import require_state
from epd_ray.storage.checkpoint import State, load_earlier
from epd_ray.storage.rollouts import read_rollouts
from epd_ray.storage.run_directory import ROLLOUT_SUFFIX, RunDirectory, numbered, read_metrics

log = logging.getLogger(__name__)


def lost_iterations(run: RunDirectory, until: int, elsewhere: Collection[int] | None = None) -> list[int]:
    """The iterations up to `until` whose row of metrics or whose rollouts are missing or damaged.

    Args:
        run: the directory of the run.
        until: the number of finished iterations.
        elsewhere: the iterations of which a remote place holds rollouts, whose content is not read; None where they
            are in the directory.
    """
    lost = set(range(until + 1)) - {int(row["iteration"]) for row in read_metrics(run.metrics)}
    if elsewhere is not None:
        lost |= set(range(1, until + 1)) - set(elsewhere)
    else:
        files = numbered(run.rollouts, ROLLOUT_SUFFIX)
        lost |= set(range(1, until + 1)) - files.keys()
        for iteration, path in files.items():
            if iteration <= until:
                try:
                    read_rollouts(path, pictures=False)
                except RunDirectoryError:
                    lost.add(iteration)
    return sorted(lost)


def restoring(name: str, run: RunDirectory, newest: State, elsewhere: Collection[int] | None) -> State:
    """The newest checkpoint, or an earlier one from which iterations that are lost are made again; says which.

    Args:
        name: the run, for messages.
        run: its directory.
        newest: the newest checkpoint.
        elsewhere: see `lost_iterations`.
    """
    lost = lost_iterations(run, newest["iteration"], elsewhere)
    if not lost:
        return newest
    earlier = load_earlier(run.checkpoints, newest["iteration"], require_state)
    same = [state for state in earlier if state["origin"] == newest["origin"]]
    back = [iteration for iteration in lost if same and iteration > same[0]["iteration"]]
    gone = [iteration for iteration in lost if iteration not in back]
    chosen = newest
    if back:
        chosen = [state for state in same if state["iteration"] < back[0]][-1]
        log.warning(
            "%s: metrics or rollouts of %s are missing or damaged: they are made again from the checkpoint of "
            "iteration %d",
            *(name, _listed(back), chosen["iteration"]),
        )
    if gone:
        log.warning(
            "%s: metrics or rollouts of %s are missing or damaged, and no checkpoint before them is left: the run goes "
            "on without them, and its results do not depend on them",
            *(name, _listed(gone)),
        )
    return chosen


def _listed(iterations: Sequence[int]) -> str:
    """Such as "iterations 1-3, 7"."""
    spans = [f"{first}-{last}" if last > first else f"{first}" for first, last in _spans(iterations)]
    return f"iteration{'s' * (len(iterations) > 1)} {', '.join(spans)}"


def _spans(iterations: Iterable[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for iteration in iterations:
        if found and found[-1][1] == iteration - 1:
            found[-1] = (found[-1][0], iteration)
        else:
            found.append((iteration, iteration))
    return found


def name_strangers(name: str, run: RunDirectory) -> None:
    """Say once what lies among the files of a run and is left alone."""
    if found := run.strangers():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        log.warning("%s: %s%s is no file of the run, and left alone", name, found[0].relative_to(run.path), more)
