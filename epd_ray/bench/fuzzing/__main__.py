"""Count how damaged documents end: `python -m epd_ray.bench.fuzzing [count] [kind ...]`.

The count is the number of documents of each kind. The command ends with code 1 if an importer crashed, hung, or read a
wrong value.
"""

import sys
from collections import Counter

from rich.console import Console
from rich.table import Table

from epd_ray.bench.fuzzing.importer import BAD, OUTCOMES
from epd_ray.bench.fuzzing.process import fuzz

COUNT = 200


def main() -> int:
    count, *kinds = [*sys.argv[1:], *[str(COUNT)][len(sys.argv) - 1 :]]
    found = fuzz(int(count), kinds)
    table = Table("kind", "inputs", *OUTCOMES, "memory, MiB")
    for kind, tried in found.items():
        _row(table, kind, tried.outcomes, tried.memory_mb)
    _row(table, "all", sum((t.outcomes for t in found.values()), Counter()), max(t.memory_mb for t in found.values()))
    Console(width=120).print(table)
    return int(any(tried.outcomes[name] for tried in found.values() for name in BAD))


def _row(table: Table, kind: str, outcomes: Counter[str], memory_mb: float) -> None:
    table.add_row(kind, str(outcomes.total()), *(str(outcomes[name]) for name in OUTCOMES), f"{memory_mb:.0f}")


if __name__ == "__main__":
    sys.exit(main())
