"""Folders and files that appear complete or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_replaceable(folder: str | os.PathLike[str], marker: str) -> None:
    """Raise ``ValueError`` unless ``folder`` is absent, empty, or an earlier result (it has a file ``marker``)."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder for the result")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ValueError(f"{folder} holds other files, which writing there would remove; name a new folder")


@contextmanager
def replacing(folder: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """A scratch folder that takes the place of ``folder`` when the block ends well and vanishes when it does not."""
    folder = Path(folder).absolute()
    check_replaceable(folder, marker)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        _open_up(scratch)
        scratch.chmod(0o755)
        publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Let whoever may read a new file of this process read all of these: safetensors writes for the owner alone."""
    new = folder / ".new"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | mode)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file by a scratch file beside it and a rename."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def publish(scratch: Path, folder: Path) -> None:
    """Rename ``scratch`` to ``folder`` and remove what was there.

    Where the kernel can exchange two names (Linux on the usual file systems) there is always a complete folder at
    ``folder``, even if the process is killed. Elsewhere there is none between two renames: an exception there puts
    the old folder back, a kill leaves it beside as ``.NAME-old-…``.
    """
    if not folder.exists():
        scratch.rename(folder)
    elif _exchange(scratch, folder):
        shutil.rmtree(scratch)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        try:
            folder.rename(aside)
            scratch.rename(folder)
        except BaseException:
            if not folder.exists():
                aside.rename(folder)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:  # a C library older than glibc 2.28
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
