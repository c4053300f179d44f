"""Counting the votes of a side-by-side page: wins, ties and losses of each solver, with an interval."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest

from epd_ray.evaluation.ab.records import RESULTS, Key, Vote, read_key, read_votes

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Standing:
    """One solver's result.

    Attributes:
        name: the solver's name.
        wins: the number of pairs in which its picture was preferred.
        ties: the number of pairs in which neither picture was.
        losses: the number of pairs in which the other picture was preferred.
    """

    name: str
    wins: int
    ties: int
    losses: int

    @property
    def decided(self) -> int:
        """The number of pairs in which one picture was preferred."""
        return self.wins + self.losses

    def share(self) -> tuple[float, float, float]:
        """The share of wins among the decided pairs, and the ends of its exact (Clopper-Pearson) 95 % interval.

        There must be at least one decided pair.
        """
        interval = binomtest(self.wins, self.decided).proportion_ci(CONFIDENCE, method="exact")
        return self.wins / self.decided, float(interval.low), float(interval.high)

    def p_value(self) -> float:
        """The probability of a result at least as uneven as this if people had no preference (two-sided sign test)."""
        return float(binomtest(self.wins, self.decided).pvalue)


def tally(key: Key, raters: Sequence[Sequence[Vote]]) -> tuple[Standing, Standing]:
    """Count the results of the solvers LEFT and RIGHT.

    A pair that several raters judged counts once, by majority, because only pairs are independent of each other.

    Args:
        key: the key of the page.
        raters: the votes of each rater, on any of the page's pairs.
    """
    swapped = {pair.id: pair.swapped for pair in key.pairs}
    balance: Counter[str] = Counter()
    for vote in (vote for votes in raters for vote in votes):
        for_left = 0 if vote.choice == "tie" else 1 if vote.choice == "left" else -1
        balance[vote.pair] += -for_left if swapped[vote.pair] else for_left
    outcomes = Counter((value > 0) - (value < 0) for value in balance.values())
    left = Standing(key.left, outcomes[1], outcomes[0], outcomes[-1])
    return left, Standing(key.right, left.losses, left.ties, left.wins)


def results(folder: Path, files: Sequence[Path]) -> list[str]:
    """Say which solver people prefer, as lines for the terminal.

    Args:
        folder: the folder of the page.
        files: the results files, one for each rater; without any, the folder's own results.json is read.

    Raises:
        SideBySideError: a file is missing or damaged, or belongs to another page.
    """
    key = read_key(folder)
    raters = [read_votes(path, key).votes for path in files or [folder / RESULTS]]
    standings = tally(key, raters)
    judged = standings[0].decided + standings[0].ties
    raters_said = f" by the majority of {len(raters)} raters" if len(raters) > 1 else ""
    lines = [f"{judged} of {len(key.pairs)} pairs judged{raters_said}"]
    width = max(len(s.name) for s in standings)
    for s in standings:
        counts = f"{s.name:<{width}}  {s.wins:>4} wins {s.ties:>4} ties {s.losses:>4} losses"
        if s.decided:
            share, low, high = s.share()
            counts += f"   preferred in {share:.1%} [{low:.1%}, {high:.1%}] of {s.decided} decided pairs"
        lines.append(counts)
    if standings[0].decided:
        lines.append(
            "brackets hold exact 95 % intervals; a two-sided sign test of no preference gives "
            f"p = {standings[0].p_value():.2g}"
        )
    return lines
