"""Generations without a catalogue behind them."""

from __future__ import annotations

from dataclasses import dataclass

from nezha_vllm.generation import Generation


@dataclass
class Loaded:
    version: str
    closed: bool = False

    def open(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


def generation(sequence: int) -> Generation:
    return Generation(sequence, f"v{sequence}", f"{sequence:064}")
