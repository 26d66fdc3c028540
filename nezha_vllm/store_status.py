"""What a store holds, told from names, sizes and manifests alone: quick, and possible while others publish."""

from __future__ import annotations

import time
from dataclasses import dataclass

from nezha_vllm.manifest import CatalogueError, read_manifest
from nezha_vllm.pointer import VERSIONS, Pointer, version_folder
from nezha_vllm.store import Store


@dataclass(frozen=True)
class Version:
    """A version as its manifest and folder describe it; ``problem`` says why it cannot be read."""

    version: str
    role: str
    items: int | None
    semantic_ids: int | None
    bytes: int
    age_seconds: float
    problem: str | None


def status(store: Store) -> tuple[Pointer, list[Version]]:
    """The pointer, and the versions, the newest first. Raises ``CatalogueError`` if the pointer cannot be read."""
    pointer = store.pointer()
    return pointer, [_describe(store, name, pointer) for name in store.names()]


def _describe(store: Store, name: str, pointer: Pointer) -> Version:
    role = {pointer.version: "current", pointer.previous: "previous"}.get(name, "")
    items = ids = problem = None
    size, age = 0, 0.0
    try:
        folder = store.folder / VERSIONS / name
        age = time.time() - folder.lstat().st_mtime
        size = sum(path.lstat().st_size for path in version_folder(store.folder, name).iterdir())
        manifest = read_manifest(folder)
        items, ids = manifest["num_items"], manifest["num_ids"]
    except (CatalogueError, OSError) as error:
        problem = str(error)
    return Version(name, role, items, ids, size, age, problem)
