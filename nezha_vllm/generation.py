"""Generations: the versions of a catalogue that a running server has gone through, one after the other.

Each publication and each rollback is a generation of its own, so a version that comes back is another one than before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nezha_vllm.manifest import CatalogueError
from nezha_vllm.pointer import Pointer, vouched_folder

FIRST = ""  # the key of the generation that a server starts with


class Generation(NamedTuple):
    """What a store's pointer said at some time; processes hand it to each other."""

    sequence: int
    version: str
    manifest: str

    @classmethod
    def of(cls, pointer: Pointer) -> Generation:
        return cls(pointer.sequence, pointer.version, pointer.manifest)

    @property
    def key(self) -> str:
        return f"{self.sequence}-{self.manifest[:12]}"

    def folder(self, store: Path) -> Path:
        """Where it lies. Raises ``CatalogueError`` if it is no longer there or another one."""
        return vouched_folder(store, self.version, self.manifest)


def check_levels(folder: Path, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise ``CatalogueError`` if a catalogue has other levels than the checkpoint."""
    if list(found) != list(expected):
        raise CatalogueError(
            f"catalogue {folder} has codebook sizes {list(found)} but the checkpoint's config.json has "
            f"{list(expected)}: serve the catalogue that the checkpoint was trained with"
        )
