"""Lines of text files, with a progress bar, and the account of those that cannot be read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import rich.progress
from rich.console import Console

EXAMPLES_KEPT = 5
EARLY_STOP = 1_000


class BrokenLines:
    """Counts lines read and lines skipped; stops the run when more than ``max_share`` of them were skipped."""

    def __init__(self, max_share: float = 0.01) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"the allowed share of broken lines must be between 0 and 1, got {max_share}")
        self.max_share = max_share
        self.read = 0
        self.skipped = 0
        self.examples: list[str] = []

    def skip(self, path: Path, line: int, reason: str) -> None:
        """Count a broken line. Raises ``ValueError`` in the middle of a long file that is hopeless."""
        self.skipped += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{path}:{line}: {reason}")
        if self.read >= EARLY_STOP:
            self.check()

    def check(self) -> None:
        """Raise ``ValueError`` with the first broken lines if there are too many."""
        if self.skipped > self.max_share * self.read:
            shown = "\n  ".join(self.examples)
            raise ValueError(
                f"{self.skipped} of {self.read} lines are broken, more than {self.max_share:.1%}:\n  {shown}\n"
                "mend the file, or allow more with --max-broken"
            )


def read_lines(path: Path, broken: BrokenLines) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 file, plain or ``.gz``; blank lines are passed over.

    Every line is counted in ``broken``; those that are not UTF-8 are skipped there. ``broken.check()`` ends the file.
    """
    console = Console(stderr=True)
    with rich.progress.open(
        path, "rb", description=f"reading {path.name}", console=console, transient=True, disable=not console.is_terminal
    ) as raw:
        lines = gzip.GzipFile(fileobj=cast(BinaryIO, raw)) if path.suffix == ".gz" else raw
        for number, line in enumerate(_whole(path, io.BufferedReader(cast(io.RawIOBase, lines))), start=1):
            if not line.strip():
                continue
            broken.read += 1
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                broken.skip(path, number, "not UTF-8")
                continue
            yield number, text
    broken.check()


def _whole(path: Path, lines: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut off or no gzip file ({error}); fetch it again") from error
