"""Whether another version fits into the memory there is."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from nezha_vllm.catalogue import CatalogueError
from nezha_vllm.memory import available_bytes, check_fits


def test_memory_that_is_not_there_refuses_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nezha_vllm.memory.available_bytes", lambda device: 1 << 30)
    check_fits(700 << 20, "version x")
    with pytest.raises(CatalogueError, match=r"version x needs 800 MiB .* 1024 MiB are available"):
        check_fits(800 << 20, "version x")


LIMITS = {
    "version 2": {"memory.max": "900", "memory.current": "800", "memory.stat": "inactive_file 30\nactive_file 20"},
    "no limit": {"memory.max": "max", "memory.current": "800", "memory.stat": "active_file 20"},
    "version 1": {
        "memory/memory.limit_in_bytes": "900",
        "memory/memory.usage_in_bytes": "800",
        "memory/memory.stat": "active_file 1\ntotal_inactive_file 30\ntotal_active_file 20",
    },
    "no container": {},
}


@pytest.mark.parametrize(("case", "left"), zip(LIMITS, [150, 1000, 150, 1000], strict=True))
def test_a_containers_limit_counts_without_the_pages_of_files(
    case: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in LIMITS[case].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("nezha_vllm.memory.CGROUP", tmp_path)
    machine = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert available_bytes() == left
