"""Verbs run one after the other, where a finished one is kept as long as its settings stay the same."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from nezha_vllm import __version__
from nezha_vllm.cli import build_parser, main

RECORD = "steps.json"


class StepFailed(Exception):
    """A verb ended with a status other than 0, and has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class Steps:
    """Runs verbs whose outputs lie in ``folder``; what was done, and with which settings, stands in ``steps.json``.

    Once a step has been run, every later one is run too: its input is new.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self._console = console
        self._record: dict[str, Any] = _read(folder / RECORD)
        self._all_kept = True

    def run(self, argv: Sequence[str], output: Path) -> bool:
        """Run one verb unless ``output`` is there from an earlier run with the same settings; returns whether it ran.

        Raises:
            StepFailed: the verb failed.
            KeyboardInterrupt: the user stopped it.
        """
        verb = argv[0]
        settings = self._settings(argv)
        typed = f"[bold]$ nezha {escape(shlex.join(argv))}[/bold]"
        if self._all_kept and output.exists() and self._record.get(verb) == settings:
            self._console.print(f"{typed}   [dim]kept[/dim]", soft_wrap=True, highlight=False)
            return False
        self._console.print(f"\n{typed}", soft_wrap=True, highlight=False)
        self._all_kept = False
        self._forget(verb)
        start = time.monotonic()
        status = main(argv)
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise StepFailed(status)
        self._record[verb] = settings
        self._write()
        self._console.print(f"[dim]{verb}: {time.monotonic() - start:.0f} s[/dim]", highlight=False)
        return True

    def _settings(self, argv: Sequence[str]) -> dict[str, str]:
        """All options, defaults included, so that new defaults of a new version run the step again."""
        values = vars(build_parser().parse_args(argv))
        texts = {name: str(value).replace(str(self.folder), ".") for name, value in values.items() if name != "run"}
        return {**texts, "version": __version__}

    def _forget(self, verb: str) -> None:
        if self._record.pop(verb, None) is not None:
            self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".{RECORD}"
        scratch.write_text(json.dumps(self._record, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, self.folder / RECORD)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
