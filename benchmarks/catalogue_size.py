"""Time, memory and bytes an item of a large catalogue on the CPU: build, publish, start of a server, look-ups, diff.

    python -m benchmarks.catalogue_size --items 1000000 --folder build/catalogue-size

Items have an ID of 12 to 13 characters, three codes of 1,024, a weight and a title. Each step is a process of its own,
as in use; its memory is the most that was resident, pages of mapped files included. The files stay in the page cache.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.apart import apart

SIZES = (1024, 1024, 1024)


def make_table(folder: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    number = pa.array(rng.permutation(count)).cast(pa.string())
    codes = rng.integers(0, SIZES[0], (count, len(SIZES)), np.int32)
    columns = {
        "item_id": pc.binary_join_element_wise("film-", pc.utf8_lpad(number, 8, "0"), ""),
        "codes": pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel()), len(SIZES)),
        "weight": pa.array(rng.random(count, np.float32)),
        "title": pc.binary_join_element_wise("A film with the number ", number, ""),
    }
    table = pa.table(columns)
    parquet.write_table(table, folder / "old.parquet")
    parquet.write_table(table.slice(count // 100), folder / "new.parquet")


def build(folder: Path, name: str) -> None:
    from nezha_vllm.item_table import build

    build(folder / f"{name}.parquet", SIZES).save(folder / name)


def publish(folder: Path, name: str) -> None:
    from nezha_vllm.store import Store

    Store(folder / "store").publish(folder / name, move=True)


def load(folder: Path) -> None:
    from nezha_vllm.catalogue import Catalogue

    catalogue = Catalogue.load(folder / "store")
    catalogue.row(catalogue.item_id(0))  # makes the index


def load_keys(folder: Path) -> None:
    from nezha_vllm.catalogue import load_keys

    load_keys(folder / "store")


def diff(folder: Path) -> None:
    from nezha_vllm.catalogue_diff import difference
    from nezha_vllm.store import Store

    store = Store(folder / "store")
    names = store.names()
    difference(store.load(names[1]), store.load(names[0]))


def look_ups(folder: Path, batch: int = 50, times: int = 2000) -> float:
    """Microseconds an item ID → row, asked 50 at a time, as for a history."""
    from nezha_vllm.catalogue import Catalogue

    catalogue = Catalogue.load(folder / "store")
    rows = np.random.default_rng(1).integers(0, catalogue.num_items, (times, batch)).tolist()
    asked = [catalogue.item_ids(some) for some in rows]
    catalogue.rows(asked[0])
    start = time.perf_counter()
    for some in asked:
        catalogue.rows(some)
    return (time.perf_counter() - start) / (batch * times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("build/catalogue-size"), help="scratch; removed at the end")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True)
    steps: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [
        ("make the table", make_table, (folder, arguments.items)),
        ("build", build, (folder, "old")),
        ("publish the first", publish, (folder, "old")),
        ("build one of 1 % fewer", build, (folder, "new")),
        ("publish it: compare, check, swap", publish, (folder, "new")),
        ("load all (API process)", load, (folder,)),
        ("load keys (engine)", load_keys, (folder,)),
        ("diff", diff, (folder,)),
    ]
    try:
        for name, step, values in steps:
            seconds, memory = apart(step, *values)
            print(f"{name:34} {seconds:7.2f} s {memory / 2**30:6.2f} GiB", flush=True)
        from nezha_vllm.store import Store

        catalogue = Store(folder / "store").load()
        for path in sorted((folder / "store/versions" / catalogue.version).iterdir()):
            print(f"{path.name} {path.stat().st_size / catalogue.num_items:.1f} bytes an item")
        print(f"look-up {look_ups(folder):.2f} µs an item")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
