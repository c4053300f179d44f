"""The figures of a benchmark as tables for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table


def show(case: str, record: Mapping[str, Any]) -> RenderableType:
    """Arrange a benchmark case's figures for the terminal.

    Figures without a group are listed. Figures named a/b/figure form a table of groups (a/b) and figures, with the
    longer side down.

    Args:
        case: the name of the case.
        record: figures by name; nested mappings count as groups.
    """
    plain = Table(show_header=False, box=None, pad_edge=False)
    single, rows = figures_of(record)
    for figure, value in single.items():
        plain.add_row(figure, text(value))
    parts: list[RenderableType] = [f"[bold]{case}[/]", *([plain] if plain.row_count else [])]
    if rows:
        figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))
        if len(figures) > len(rows):
            rows = {f: {head: row[f] for head, row in rows.items() if f in row} for f in figures}
            figures = list(dict.fromkeys(head for row in rows.values() for head in row))
        wide = Table("", *figures, box=None, pad_edge=False)
        for column in wide.columns:
            column.justify = "left" if column is wide.columns[0] else "right"
            column.overflow = "fold"  # because a name that is cut off cannot be read
        for head, row in rows.items():
            wide.add_row(head, *(text(row[figure]) if figure in row else "" for figure in figures))
        parts.append(wide)
    return Group(*parts, "")


def figures_of(record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split a record into its single figures, and the groups a/b -> figure -> value of those named a/b/figure."""
    single: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for path, value in _flat(record):
        head, _, figure = path.rpartition("/")
        (rows.setdefault(head, {}) if head else single)[figure] = value
    return single, rows


def _flat(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}/")
        else:
            yield f"{before}{name}", value


def text(value: Any) -> str:
    """Write a figure for people: numbers with four digits, and "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
