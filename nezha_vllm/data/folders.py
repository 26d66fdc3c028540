"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nezha_vllm.folders import publish


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
        scratch.chmod(0o755)
        publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file by a scratch file beside it and a rename."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
