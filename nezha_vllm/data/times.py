"""Times as numbers."""

from __future__ import annotations

import math
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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"time {value!r} is no finite number")
    return float(value)
