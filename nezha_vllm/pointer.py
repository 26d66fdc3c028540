"""The pointer of a catalogue store: the one small file that says which version is current.

A store is a folder with

* ``CURRENT``: the pointer, a JSON object, replaced as a whole by a rename;
* ``versions/NAME/``: catalogue folders that never change once they are there.

Whoever follows a store reads ``CURRENT`` again and compares ``sequence``, which grows with every publication.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from nezha_vllm.manifest import MANIFEST, CatalogueError, checksum, read_manifest, read_small

CURRENT, VERSIONS = "CURRENT", "versions"
POINTER_FORMAT = 1
SCRATCH_POINTER = f".{CURRENT}-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pointer:
    """``manifest`` is the checksum of the version's manifest, so a pointer vouches for every byte it leads to."""

    version: str
    manifest: str
    sequence: int
    previous: str | None
    time: str


def is_version_name(name: str) -> bool:
    """Whether it can name a folder of a store: never a path, never hidden."""
    return NAME.fullmatch(name) is not None


def is_store(folder: str | os.PathLike[str]) -> bool:
    return os.path.lexists(Path(folder, CURRENT)) and not Path(folder, MANIFEST).exists()


def read_pointer(store: Path) -> Pointer:
    """Raises ``CatalogueError`` if it is missing or damaged."""
    path = store / CURRENT
    remedy = f"see what there is with `nezha catalogue status {store}` and choose with `nezha catalogue rollback --to`"
    try:
        if path.is_symlink() or not path.is_file():
            raise CatalogueError(f"{path} is no regular file; {remedy}")
        fields = json.loads(read_small(path))
        if fields.pop("checksum") != checksum(fields):
            raise CatalogueError(f"{path} is damaged: its checksum does not match; {remedy}")
        if fields.pop("format") != POINTER_FORMAT:
            raise CatalogueError(f"{path} has a format that this version does not read; {remedy}")
        pointer = Pointer(**fields)
        names = [pointer.version] if pointer.previous is None else [pointer.version, pointer.previous]
        counts = type(pointer.sequence) is int and 0 <= pointer.sequence < 2**63  # engines are told of it
        if not all(map(is_version_name, names)) or not counts:
            raise CatalogueError(f"{path} is damaged: {names} with sequence {pointer.sequence!r}; {remedy}")
    except CatalogueError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise CatalogueError(f"{path} is damaged ({error!r}); {remedy}") from error
    return pointer


def write_pointer(store: Path, pointer: Pointer) -> None:
    """Swap the pointer: whatever happens meanwhile, a reader finds the old or the new one."""
    fields = {"format": POINTER_FORMAT, **asdict(pointer)}
    text = json.dumps(fields | {"checksum": checksum(fields)}, indent=2) + "\n"
    scratch = store / f"{SCRATCH_POINTER}{os.getpid()}"
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    with open(descriptor, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, store / CURRENT)
    sync_folder(store)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def version_folder(store: Path, name: str) -> Path:
    """Folder of a version. Raises ``CatalogueError`` if a name or a symbolic link would lead out of the store."""
    if not is_version_name(name):
        raise CatalogueError(f"{name!r} is no version of a store: letters, digits and . _ - only, at most 64")
    folder = store / VERSIONS / name
    for path in (folder.parent, folder):
        if path.is_symlink() or not path.is_dir():
            raise CatalogueError(f"{path} is no folder, so {store} has no version {name}")
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            raise CatalogueError(f"{path} is no regular file; a version of a store holds nothing else")
    return folder


def vouched_folder(store: Path, version: str, manifest: str) -> Path:
    """Folder of the version whose manifest has the checksum ``manifest``. Raises ``CatalogueError``."""
    folder = version_folder(store, version)
    found = read_manifest(folder)
    if (found["version"], found["checksum"]) != (version, manifest):
        raise CatalogueError(f"{folder / MANIFEST} is damaged: it is not the one that {CURRENT} vouches for")
    return folder


def resolve(folder: str | os.PathLike[str]) -> tuple[Path, Pointer | None]:
    """The catalogue folder that a folder stands for: itself, or the current version of a store."""
    folder = Path(folder)
    if not is_store(folder):
        return folder, None
    pointer = read_pointer(folder)
    return version_folder(folder, pointer.version), pointer


def published_at(folder: str | os.PathLike[str], version: str) -> float:
    """Unix time at which a store's pointer was swapped to a version, or a catalogue folder was saved.

    Where the pointer has moved on, or is damaged, it is the time of the version's files, which ``--move`` brings along.
    """
    folder = Path(folder)
    if not is_store(folder):
        return (folder / MANIFEST).stat().st_mtime
    with suppress(CatalogueError, TypeError, ValueError):
        pointer = read_pointer(folder)
        if pointer.version == version:
            return datetime.fromisoformat(pointer.time).timestamp()
    return (folder / VERSIONS / version / MANIFEST).stat().st_mtime


def read_steadily(folder: str | os.PathLike[str], read: Callable[[Path, dict[str, Any]], Result]) -> Result:
    """``read(catalogue folder, manifest)``, and again if another catalogue took its place meanwhile."""
    while True:
        place, manifest, identity = _look(folder)
        try:
            result = read(place, manifest)
        except CatalogueError:
            if _look(folder)[2] == identity:
                raise
            continue
        if _look(folder)[2] == identity:
            return result


def _look(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], tuple[Any, ...]]:
    """Catalogue folder, manifest, and what tells it from the same content that came and went meanwhile."""
    place, pointer = resolve(folder)
    manifest = read_manifest(place)
    if pointer is not None and (manifest["version"], manifest["checksum"]) != (pointer.version, pointer.manifest):
        raise CatalogueError(f"{place / MANIFEST} is damaged: it is not the one that {CURRENT} vouches for")
    try:
        status = (place / MANIFEST).stat()
    except FileNotFoundError:  # removed since: by whoever replaces it
        return _look(folder)
    return place, manifest, (manifest["checksum"], status.st_ino, status.st_mtime_ns)
