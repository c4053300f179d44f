"""What came of a page: wins, ties and losses per solver, with an interval."""

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
        name: of the solver.
        wins: pairs where its picture was preferred.
        ties: pairs where neither was.
        losses: pairs where the other's was.
    """

    name: str
    wins: int
    ties: int
    losses: int

    @property
    def decided(self) -> int:
        """Pairs where one picture was preferred."""
        return self.wins + self.losses

    def share(self) -> tuple[float, float, float]:
        """Wins among the decided pairs, at least one, with the exact (Clopper-Pearson) 95 % interval."""
        interval = binomtest(self.wins, self.decided).proportion_ci(CONFIDENCE, method="exact")
        return self.wins / self.decided, float(interval.low), float(interval.high)

    def p_value(self) -> float:
        """Of so uneven a result where people have no preference (two-sided sign test)."""
        return float(binomtest(self.wins, self.decided).pvalue)


def tally(key: Key, raters: Sequence[Sequence[Vote]]) -> tuple[Standing, Standing]:
    """The standings of LEFT and RIGHT. Of several raters, each pair goes by majority: pairs are what is independent.

    Args:
        key: of the page.
        raters: votes of each, on any of its pairs.
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
    """Un-blind a page's results, for the terminal.

    Args:
        folder: of the page.
        files: results, one per rater; none: the folder's own results.json.

    Raises:
        SideBySideError: a file that is missing, damaged, or of another page.
    """
    key = read_key(folder)
    raters = [read_votes(path, key).votes for path in files or [folder / RESULTS]]
    standings = tally(key, raters)
    judged = standings[0].decided + standings[0].ties
    raters_said = f", {len(raters)} raters, by majority" if len(raters) > 1 else ""
    lines = [f"{judged} of {len(key.pairs)} pairs judged{raters_said}"]
    width = max(len(s.name) for s in standings)
    for s in standings:
        counts = f"{s.name:<{width}}  {s.wins:>4} wins {s.ties:>4} ties {s.losses:>4} losses"
        if s.decided:
            share, low, high = s.share()
            counts += f"   preferred in {share:.1%} [{low:.1%}, {high:.1%}] of {s.decided} decided"
        lines.append(counts)
    if standings[0].decided:
        lines.append(f"exact 95 % intervals; sign test against no preference: p = {standings[0].p_value():.2g}")
    return lines
