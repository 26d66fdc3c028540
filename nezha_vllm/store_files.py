"""Steps on a store's files that last through crashes, and the lock that lets one process at a time take them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nezha_vllm.manifest import CatalogueError
from nezha_vllm.pointer import SCRATCH_POINTER, VERSIONS, sync_folder

LOCK = ".lock"
SCRATCH_VERSION = ".publishing-"


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Exclusive use of the store by writers; it ends with the process, however that ends."""
    descriptor = os.open(store / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CatalogueError(
                f"another process is publishing to {store} or rolling it back; try again when it is done"
            ) from None
        yield
    finally:
        os.close(descriptor)


def clear_debris(store: Path) -> None:
    """Remove what killed publishers left. Only under the lock."""
    for path in (store / VERSIONS).glob(f"{SCRATCH_VERSION}*"):
        shutil.rmtree(path)
    for path in store.glob(f"{SCRATCH_POINTER}*"):
        path.unlink()


@contextmanager
def scratch_version(store: Path) -> Iterator[Path]:
    """A folder to prepare a version in; what is still there at the end is removed."""
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_VERSION, dir=store / VERSIONS))
    try:
        scratch.chmod(0o755)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_version(store: Path, name: str) -> None:
    """Remove a version; it is gone in one step, what a crash leaves of it is debris."""
    aside = store / VERSIONS / f"{SCRATCH_VERSION}old-{name}"
    os.rename(store / VERSIONS / name, aside)
    shutil.rmtree(aside)


def bring(source: Path, target: Path, names: Sequence[str], *, link: bool) -> None:
    """Copy files, or link them where the file system can, and wait until they are on disk."""
    for name in names:
        if not (source / name).is_file():
            raise CatalogueError(f"{source / name} is missing")
        if not (link and _linked(source / name, target / name)):
            shutil.copyfile(source / name, target / name)
        descriptor = os.open(target / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(target)


def remove_files(folder: Path, names: Sequence[str]) -> None:
    """Remove these files, and the folder if nothing else is in it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _linked(source: Path, target: Path) -> bool:
    if source.is_symlink():
        return False
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return False
    return True
