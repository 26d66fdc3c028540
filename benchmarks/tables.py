"""Tables and plots of the rows in ``benchmarks/results``, written where the documentation has marks for them.

python -m benchmarks.tables            README.md, docs/performance.md and docs/images/
python -m benchmarks.tables --show     to the terminal instead

A table named NAME goes between ``<!-- benchmarks:NAME begin -->`` and ``<!-- benchmarks:NAME end -->``; where there
are no rows, the text there stays as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import kernel_tables, served_tables
from benchmarks.choose import measured, of_each_gpu, one_machine, results, together
from benchmarks.machine import ROOT
from benchmarks.rows import RESULTS, Row
from benchmarks.timeline import links

DOCUMENTS = ("README.md", "docs/performance.md")
IMAGES = ROOT / "docs" / "images"
TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "latency": ("latency", lambda rows: served_tables.latency(rows, "http")),
    "latency-offline": ("latency", lambda rows: served_tables.latency(rows, "offline")),
    "latency-in-process": ("latency", lambda rows: served_tables.latency(rows, "in-process")),
    "throughput": ("throughput", served_tables.throughput),
    "batches": ("throughput", served_tables.batches),
    "kernels": ("kernels", kernel_tables.stages),
    "kernel-parts": ("kernels", kernel_tables.parts),
    "validity": ("validity", kernel_tables.validity),
    "agreement": ("agreement", served_tables.agreement),
}
# beside those of most rows' GPU
H200 = {f"{name}-h200": TABLES[name] for name in ("kernels", "kernel-parts", "latency-in-process")}
TOGETHER = {f"{name}-together": TABLES[name] for name in ("latency", "throughput")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--documents", nargs="*", type=Path, default=[ROOT / name for name in DOCUMENTS])
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="DIR")
    parser.add_argument("--gpu", default="", help="beginning of a GPU's name (default: that of most rows)")
    parser.add_argument("--vllm", default="", help="beginning of a version (default: the highest)")
    parser.add_argument("--show", action="store_true", help="print the tables, write nothing")
    arguments = parser.parse_args(argv)
    found = make_tables(arguments.results, arguments.gpu, arguments.vllm)
    if arguments.show:
        for name, text in found.items():
            print(f"## {name}\n\n{text}\n")
        return 0
    for document in arguments.documents:
        if document.is_file():
            print(f"{document.name}: {', '.join(fill(document, found)) or 'nothing to write'}")
    from benchmarks.plots import draw_all

    for image in draw_all(arguments.results, arguments.images, arguments.gpu, arguments.vllm):
        print(image)
    return 0


def make_tables(folder: Path, gpu: str = "", vllm: str = "") -> dict[str, str]:
    """All tables that have rows, by name."""
    texts = {name: make(results(folder, file, gpu, vllm)) for name, (file, make) in TABLES.items()}
    texts |= {name: make(results(folder, file, "NVIDIA H200", vllm)) for name, (file, make) in H200.items()}
    texts |= {name: make(together(folder, file, gpu, vllm)) for name, (file, make) in TOGETHER.items()}
    profiles = of_each_gpu(folder, "profile", gpu, vllm)
    texts |= {f"profile-{side}": kernel_tables.profile(profiles, side) for side in ("gpu", "host")}
    texts["item-scores"] = kernel_tables.item_scores(one_machine(measured(folder, "kernels"), gpu, vllm))
    texts["summary"] = served_tables.summary(*(results(folder, name, gpu, vllm) for name in ("latency", "throughput")))
    texts["timelines"] = links(folder)
    return {name: text for name, text in texts.items() if text}


def fill(document: Path, tables: dict[str, str]) -> list[str]:
    """Write the tables a document has marks for; returns their names. Raises ``ValueError`` for a mark without end.

    Marks of names that are no table of ours are left alone.
    """
    text = document.read_text(encoding="utf-8")
    written = []
    for name in re.findall(r"<!-- benchmarks:([\w-]+) begin -->", text):
        if name not in tables:
            continue
        begin, end = f"<!-- benchmarks:{name} begin -->", f"<!-- benchmarks:{name} end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{document}: {begin} has no end")
        text = f"{before}{begin}\n{tables[name]}\n{end}{after}"
        written.append(name)
    document.write_text(text, encoding="utf-8")
    return written


if __name__ == "__main__":
    sys.exit(main())
