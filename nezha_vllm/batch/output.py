"""The folder of a job's results: each part appears whole or not at all, so a stopped job goes on where it was.

* ``part-000000.parquet`` …: one file a part of the input, named by its number: two workers that both score a part,
  because one was believed dead, write the same file;
* ``_job.json``: what the job is; another job is not written into the folder;
* ``_SUCCESS``: all parts are there.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from nezha_vllm.batch.parts import Part
from nezha_vllm.folders import write_atomically
from nezha_vllm.pointer import sync_folder

JOB, LOCK, SUCCESS = "_job.json", "_lock", "_SUCCESS"
SCRATCH = ".scratch-"
ERRORS = b"nezha.errors"


class JobError(ValueError):
    """The folder belongs to another job, or another process works on it; the message has the remedy."""


class Output:
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one driver at a time. Raises ``JobError`` for a second one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError(f"another process is writing to {self.folder}; wait for it or stop it") from None
            yield

    def begin(self, job: dict[str, Any]) -> dict[str, Any]:
        """Make the folder the job's, or find it there; returns the job as it was begun. Raises ``JobError``.

        ``catalogue`` may have changed since: a job keeps the one it began with.
        """
        path = self.folder / JOB
        if not path.exists():
            others = [name for name in os.listdir(self.folder) if name != LOCK]
            if others:
                raise JobError(f"{self.folder} holds other files, {sorted(others)[:3]}; name a new folder")
            write_atomically(path, json.dumps(job, indent=2) + "\n")
            return job
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in job.keys() | begun.keys() if begun.get(name) != job.get(name))
        changed = [name for name in changed if name != "catalogue"]
        if changed:
            raise JobError(
                f"{self.folder} has results of a job with other {', '.join(changed)} (see {path}); go on with the "
                "same, or name a new folder"
            )
        for scratch in self.folder.glob(f"{SCRATCH}*"):  # of workers that were killed
            scratch.unlink(missing_ok=True)
        return begun

    def errors_of(self, part: Part) -> int | None:
        """How many rows of a finished part are errors; None if it is not there, or not whole."""
        try:
            with parquet.ParquetFile(self.folder / part.name) as file:
                return int(file.schema_arrow.metadata[ERRORS]) if file.metadata.num_rows == part.rows else None
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
            return None

    def write(self, part: Part, table: pa.Table) -> int:
        """Write a part's results; returns how many of its rows are errors."""
        assert len(table) == part.rows
        errors = part.rows - table["error"].null_count
        scratch = self.folder / f"{SCRATCH}{uuid.uuid4().hex}"
        try:
            with open(scratch, "wb") as file:
                parquet.write_table(table.replace_schema_metadata({ERRORS: str(errors)}), file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.folder / part.name)
        finally:
            scratch.unlink(missing_ok=True)
        sync_folder(self.folder)
        return errors

    def finish(self, report: dict[str, Any]) -> None:
        write_atomically(self.folder / SUCCESS, json.dumps(report) + "\n")
