"""Rows of values as a table on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def print_table(rows: list[dict[str, Any]], left: Sequence[str] = ()) -> None:
    """Rows with equal keys as a table on standard output; columns in `left` are aligned there."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{number:+.5g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
