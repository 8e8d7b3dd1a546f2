"""Records as tables on the terminal: a column for each field."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Of standard output; as wide as a page where that is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)


def table(rows: Sequence[BaseModel], title: str) -> Table:
    """Of at least one row, all of one kind."""
    found = Table(title=title, title_justify="left")
    for name in type(rows[0]).model_fields:
        found.add_column(name.replace("_", " "))
    for row in rows:
        found.add_row(*(_text(value) for value in row.model_dump().values()))
    return found


def side_by_side(columns: Mapping[str, BaseModel], title: str) -> Table:
    """As `table`, turned: a row for each field."""
    found = Table(title=title, title_justify="left")
    for name in ("", *columns):
        found.add_column(name)
    records = [record.model_dump() for record in columns.values()]
    for name in records[0]:
        found.add_row(name.replace("_", " "), *(_text(record[name]) for record in records))
    return found


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
