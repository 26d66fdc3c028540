"""Times as numbers."""

from __future__ import annotations

import math
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any


def seconds(value: Any) -> float:
    """A time as a number: numbers as they are, dates as seconds since 1970. Raises ``ValueError``."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                raise ValueError(f"time {value!r} is no number and no date of ISO 8601") from None
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    with suppress(OverflowError):  # a whole number too large for float
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise ValueError(f"time {value!r} is no finite number")
