"""Tables of texts: in a terminal, and as a page that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from byheart.report import render
from byheart.storage import write_text

if TYPE_CHECKING:
    from rich.table import Table

# Title, head and rows.
Grid = tuple[str, list[str], list[list[str]]]


def terminal_table(grid: Grid) -> Table:
    """A grid for rich to print."""
    from rich.table import Table

    title, head, rows = grid
    table = Table(title=title, title_justify="left")
    for column in head:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def write_page(folder: Path, title: str, lead: str, sections: list[dict[str, Any]], record: dict[str, Any]) -> Path:
    """Write ``report.html``; it opens offline, with no other file.

    Args:
        sections: each with a ``title``, and ``svg``, ``head`` and ``rows``, or a ``note``.
        record: how the figures were made.
    """
    path = folder / "report.html"
    write_text(path, render("tables.html", title=title, lead=lead, sections=sections, record=record))
    return path
