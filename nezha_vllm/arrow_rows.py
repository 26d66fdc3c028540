"""Rows of Arrow tables as dictionaries, where a file may hold what Python cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa


def rows_of(table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any] | ValueError]:
    """A dictionary for each row, or why it cannot be read: text that is no UTF-8, a date behind the year 9999."""
    try:
        yield from table.to_pylist()
    except (ValueError, OverflowError):
        for at in range(len(table)):
            try:
                yield table.slice(at, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield ValueError(str(error))
