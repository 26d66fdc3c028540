"""Putting a finished folder in the place of an older one."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
