"""Memory of a server's processes, read from /proc."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path


def resident_bytes(group: int) -> dict[str, int]:
    """Memory of each process of a process group that is its own, by the name vLLM gives it.

    Pages of mapped files are left out: the kernel takes them back when it needs them, and processes share them.
    """
    found: dict[str, int] = {}
    names: Counter[str] = Counter()
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if os.getpgid(int(entry.name)) != group:
                continue
            title = (entry / "cmdline").read_text().replace("\0", " ")
            fields = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
            anonymous = int(fields["RssAnon"].split()[0]) << 10
        except (ProcessLookupError, FileNotFoundError, KeyError):  # it ended, or is ending
            continue
        match = re.search(r"(VLLM::\w+|resource_tracker|vllm serve)", title)
        name = match[1].removeprefix("VLLM::") if match else "other"
        names[name] += 1
        found[f"{name}{'' if names[name] == 1 else f' {names[name]}'}"] = anonymous
    return found
