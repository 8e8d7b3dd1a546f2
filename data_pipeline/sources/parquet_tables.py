"""Columns of parquet files, in which a few bytes may stand for any number of equal values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .base import SourceError
from .files import bounded_memory, check_file, check_size

UNREADABLE = (SourceError, OSError, ValueError, pa.ArrowException)  # what opening and reading a parquet file raises


def open_table(path: Path) -> pq.ParquetFile:
    """One of UNREADABLE where there is no parquet file."""
    check_file(path)
    with bounded_memory(path):
        return pq.ParquetFile(path)


def read_columns(
    path: Path, parquet: pq.ParquetFile, columns: Sequence[str], row_groups: Sequence[int] | None = None
) -> pa.Table:
    """One of UNREADABLE where that cannot be done, or takes too much memory."""
    metadata = parquet.metadata
    groups = list(range(metadata.num_row_groups) if row_groups is None else row_groups)
    stored = [metadata.row_group(group).column(i) for group in groups for i in range(metadata.num_columns)]
    wanted = [one for one in stored if any(f"{one.path_in_schema}.".startswith(f"{name}.") for name in columns)]
    num_bytes = sum(max(8 * one.num_values, one.total_uncompressed_size) for one in wanted)
    check_size(num_bytes, path, f"its {', '.join(columns)}")
    with bounded_memory(path):  # a page may unpack to more than the footer says of it
        return parquet.read_row_groups(groups, columns=list(columns), use_threads=False)


def row_groups_with(parquet: pq.ParquetFile, column: str, value: int) -> list[int]:
    """The parts of a table that may hold rows with this value, by their statistics."""
    metadata = parquet.metadata
    index = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column)
    found = []
    for number in range(metadata.num_row_groups):
        known = metadata.row_group(number).column(index).statistics
        if known is None or not known.has_min_max or known.min <= value <= known.max:
            found.append(number)
    return found


def first_line(error: Exception) -> str:
    text = error.detail if isinstance(error, SourceError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]
