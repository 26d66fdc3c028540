"""A store of catalogue versions: publish checks a new one completely, then swaps the pointer.

Order is what makes it safe: files, then their folder's name, then the pointer, then the removal of old versions, each
on disk before the next begins. A crash at any instant leaves the old or the new version current; the next publisher
removes what it left behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from nezha_vllm.catalogue import ITEMS, KEYS, MANIFEST, Catalogue, CatalogueError
from nezha_vllm.catalogue_diff import lost_share
from nezha_vllm.folders import publish as replace_folder
from nezha_vllm.manifest import read_manifest
from nezha_vllm.pointer import (
    CURRENT,
    VERSIONS,
    Pointer,
    is_store,
    is_version_name,
    read_pointer,
    resolve,
    sync_folder,
    version_folder,
    write_pointer,
)
from nezha_vllm.store_files import bring, clear_debris, locked, remove_files, remove_version, scratch_version

FILES = (MANIFEST, ITEMS, KEYS)


class Store:
    """Raises ``CatalogueError`` for whatever a caller or a disk can cause; then the old version is still current."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).resolve()

    def pointer(self) -> Pointer:
        if not is_store(self.folder):
            raise CatalogueError(
                f"{self.folder} is no catalogue store: {CURRENT} is missing; start one with "
                "`nezha catalogue publish STORE CATALOGUE`"
            )
        return read_pointer(self.folder)

    def load(self, name: str | None = None) -> Catalogue:
        """A version, every check made; the current one by default."""
        if name is None:
            return Catalogue.load(self.folder)
        catalogue = Catalogue.load(version_folder(self.folder, name))
        if catalogue.version != name:
            raise CatalogueError(f"{self.folder / VERSIONS / name} holds version {catalogue.version}")
        return catalogue

    def names(self) -> list[str]:
        """Versions there are, the newest first."""
        folder = self.folder / VERSIONS
        found = [path for path in folder.iterdir() if is_version_name(path.name)] if folder.is_dir() else []
        return [path.name for path in sorted(found, key=_time, reverse=True)]

    def verify(self, name: str | None = None) -> dict[str, str | None]:
        """Check all files of one version or of all, and the pointer; each version's problem, None where it is whole."""
        pointer = self.pointer()
        problems: dict[str, str | None] = {}
        for version in [name] if name else dict.fromkeys([pointer.version, *self.names()]):
            try:
                self.load(None if version == pointer.version else version)
                problems[version] = None
            except CatalogueError as error:
                problems[version] = str(error)
        return problems

    def publish(
        self,
        source: str | os.PathLike[str],
        *,
        move: bool = False,
        max_lost: float = 0.05,
        force: bool = False,
        keep: int = 3,
    ) -> tuple[Pointer, bool]:
        """Make a catalogue folder, or another store's current version, the current version.

        Args:
            source: what to publish.
            move: link its files instead of copying them where possible, and remove ``source`` at the end.
            max_lost: refuse if a larger share of the current version's items is missing.
            force: do not compare with the current version; codebook sizes must still agree.
            keep: old versions to keep, the previous one among them.

        Returns:
            The pointer, and whether it was swapped: False if this content was current already.
        """
        source = Path(source).resolve()
        if not 0 <= max_lost <= 1 or keep < 1:
            raise CatalogueError(f"need 0 ≤ max_lost ≤ 1 and keep ≥ 1, got {max_lost} and {keep}")
        if move and (is_store(source) or source.is_relative_to(self.folder)):
            raise CatalogueError(f"{source} is part of a store, which cannot be moved away; leave out --move")
        source = resolve(source)[0]
        manifest = read_manifest(source)
        name, checksum = manifest["version"], manifest["checksum"]
        if not is_version_name(name):
            raise CatalogueError(
                f"version {name!r} of {source} cannot name a folder: take letters, digits and . _ -, at most 64"
            )
        with self._writing(make=True):
            old = self._old_pointer(force)
            catalogue = self._present(name, checksum)
            swap = catalogue is None or old is None or (old.version, old.manifest) != (name, checksum)
            if catalogue is None:
                self._add(source, name, move, old, max_lost, force)
            elif swap:
                self._compare(catalogue, old, max_lost, force)
                os.utime(self.folder / VERSIONS / name)  # the newest again
            pointer = self._point(name, checksum, old) if swap or old is None else old
            self._prune(pointer, keep)
            if move:
                remove_files(source, FILES)
        return pointer, swap

    def rollback(self, name: str | None = None) -> Pointer:
        """Make the previous version, or a named one, current again. Works with a damaged pointer if named."""
        if not (self.folder / VERSIONS).is_dir():
            self.pointer()  # says what is missing
        with self._writing():
            old = self._old_pointer(force=name is not None)
            name = name or (old.previous if old else None)
            if name is None:
                raise CatalogueError(f"{self.folder} has no previous version; name one of {self.names()} with --to")
            if old is not None and old.version == name:
                raise CatalogueError(f"version {name} is the current one already")
            self.load(name)
            return self._point(name, read_manifest(self.folder / VERSIONS / name)["checksum"], old)

    def _make(self) -> None:
        if (self.folder / MANIFEST).exists():
            raise CatalogueError(f"{self.folder} is a catalogue; name another folder for the store")
        versions = self.folder / VERSIONS
        if self.folder.exists() and not versions.is_dir() and any(self.folder.iterdir()):
            raise CatalogueError(f"{self.folder} exists and is no store; name another folder")
        versions.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _writing(self, make: bool = False) -> Iterator[None]:
        try:
            if make:
                self._make()
            with locked(self.folder):
                clear_debris(self.folder)
                yield
        except OSError as error:
            raise CatalogueError(
                f"cannot finish writing to {self.folder}: {error}; the store is whole all the same: mend this, then "
                "try again"
            ) from error

    def _old_pointer(self, force: bool) -> Pointer | None:
        """None in a new store and, if forced, where the pointer cannot be read."""
        if not is_store(self.folder):
            return None
        try:
            return read_pointer(self.folder)
        except CatalogueError:
            if not force:
                raise
            return None

    def _present(self, name: str, checksum: str) -> Catalogue | None:
        """This content if it lies in the store undamaged. Raises ``CatalogueError`` if other content has the name."""
        try:
            found = read_manifest(version_folder(self.folder, name))
        except CatalogueError:
            return None
        if found["checksum"] != checksum:
            raise CatalogueError(f"{self.folder} has another version {name}; give this one a name of its own")
        try:
            return self.load(name)
        except CatalogueError:
            return None

    def _add(self, source: Path, name: str, move: bool, old: Pointer | None, max_lost: float, force: bool) -> None:
        with scratch_version(self.folder) as scratch:
            bring(source, scratch, FILES, link=move)
            catalogue = Catalogue.load(scratch)  # from the files as they lie in the store
            if catalogue.version != name:
                raise CatalogueError(f"{source} was replaced while it was being published; publish it again")
            if old is None or old.version != name:  # else it repairs the current version
                self._compare(catalogue, old, max_lost, force)
            replace_folder(scratch, self.folder / VERSIONS / name)
            sync_folder(self.folder / VERSIONS)

    def _compare(self, new: Catalogue, old: Pointer | None, max_lost: float, force: bool) -> None:
        """Raise unless the current version's readers can go on with the new one."""
        if old is None:
            return
        try:
            current = self.load()
        except CatalogueError as error:
            if force:
                return
            raise CatalogueError(f"cannot compare with the current version, add --force: {error}") from error
        if current.codec != new.codec:
            raise CatalogueError(
                f"codebook sizes are {list(new.codec.codebook_sizes)}, those of the current version "
                f"{list(current.codec.codebook_sizes)}: it needs another checkpoint, and so another store"
            )
        if force:
            return
        missing = [name for name in current.segments.names if name not in new.segments.names]
        if missing:
            raise CatalogueError(
                f"segments {missing} of current version {old.version} are missing, and requests that name them would "
                "be refused; if that is meant, add --force"
            )
        lost = lost_share(current, new)
        if lost > max_lost:
            raise CatalogueError(
                f"{lost:.1%} of the items of current version {old.version} are missing, more than {max_lost:.1%}; "
                "if that is meant, add --force or a larger --max-lost"
            )

    def _point(self, name: str, checksum: str, old: Pointer | None) -> Pointer:
        # where the pointer was lost the count goes on from the time in seconds, which no count has reached
        sequence = old.sequence + 1 if old else 1 if self.names() == [name] else int(time.time())
        previous = old.version if old and old.version != name else old.previous if old else None
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        pointer = Pointer(name, checksum, sequence, previous, now)
        write_pointer(self.folder, pointer)
        return pointer

    def _prune(self, pointer: Pointer, keep: int) -> None:
        """Remove all but the newest old versions; the previous one counts and always stays."""
        old = [name for name in self.names() if name not in (pointer.version, pointer.previous)]
        for name in old[max(0, keep - (pointer.previous is not None)) :]:
            remove_version(self.folder, name)


def _time(folder: Path) -> float:
    return folder.lstat().st_mtime
