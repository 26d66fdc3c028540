"""What every reader of a public format yields: interactions and items, one record at a time.

A reader is a class with the three members of ``Reader``; a new format is a new file beside ``recbole.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from nezha_vllm.data.lines import BrokenLines


class Interaction(NamedTuple):
    """One user met one item. ``time`` is in any unit that sorts; ``None`` means the file's order is the time order."""

    user_id: str
    item_id: str
    time: float | None


@dataclass(frozen=True)
class ItemRecord:
    """One item: ``title`` for people, ``text`` for feature models, ``metadata`` as further columns of the catalogue."""

    item_id: str
    title: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Reader(Protocol):
    """Streams one data set. Broken lines are skipped and counted in ``broken``.

    ``clock``: whether the times of different users can be compared, known when ``interactions`` has been read.
    """

    broken: BrokenLines
    clock: bool

    def interactions(self) -> Iterator[Interaction]: ...

    def items(self) -> Iterator[ItemRecord]: ...
