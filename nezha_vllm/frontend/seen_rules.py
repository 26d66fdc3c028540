"""Rules of requests with long lists, kept: many callers send a list again, and 10,000 IDs take milliseconds to find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from nezha_vllm.frontend.rules import Rules

LONG = 4 << 10  # bytes of options that are worth it, some hundred IDs
MAX_BYTES = 64 << 20  # of options and rules, a catalogue; 300 lists of 10,000 short IDs


class Seen(NamedTuple):
    options: Mapping[str, Any]  # without the lists
    rules: Rules
    size: int


class SeenRules:
    """Rules over one catalogue by the bytes of ``vllm_xargs`` that they were read from; nothing else decides them."""

    def __init__(self) -> None:
        self._seen: dict[bytes, Seen] = {}  # the one that was not asked for longest comes first
        self.bytes = 0

    def find(self, asked: bytes) -> Seen | None:
        seen = self._seen.pop(asked, None)
        if seen is not None:
            self._seen[asked] = seen
        return seen

    def keep(self, asked: bytes, options: Mapping[str, Any], rules: Rules) -> None:
        """Keep them, unless they are short or depend on the prompt."""
        if len(asked) < LONG or options.get("exclude_history"):
            return
        few = {name: value for name, value in options.items() if not isinstance(value, list)}
        eligible = rules.eligible
        size = len(asked) + (0 if eligible is None else eligible.rows.nbytes + eligible.positions.nbytes)
        self._seen[asked] = Seen(few, rules, size)
        self.bytes += size
        while self.bytes > MAX_BYTES:
            self.bytes -= self._seen.pop(next(iter(self._seen))).size
