"""The catalogue: which items exist, which semantic ID each has, and how both are kept on disk.

A catalogue is a folder of three files:

* ``manifest.json``: format, version, codebook sizes, counts, and the size and SHA-256 of the other two files;
* ``items.arrow``: one row an item in an uncompressed, memory-mappable Arrow IPC file, with ``item_id`` (string),
  ``codes`` (fixed-size list of int32), ``weight`` (float32) and any metadata columns;
* ``keys.safetensors``: ``keys`` int64 [M], the distinct semantic IDs in ascending key order (see ``semantic_id``);
  ``first_row`` int64 [M + 1], where each ID's items start; ``rows_by_id`` int64 [items], rows in order of item ID.

Rows are ordered by key, then by weight (largest first), then by item ID: items that share a semantic ID have one
defined order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load_file, save_file

from nezha_vllm.semantic_id import SemanticIdCodec

FORMAT = 1
MANIFEST, ITEMS, KEYS = "manifest.json", "items.arrow", "keys.safetensors"
RESERVED_COLUMNS = ("item_id", "codes", "weight")


class CatalogueError(ValueError):
    """A catalogue cannot be built, read or trusted; the message names the file and the remedy."""


class UnknownItemError(KeyError):
    """An item ID that the catalogue does not hold."""

    def __str__(self) -> str:
        return f"item {self.args[0]!r} is not in the catalogue"


@dataclass(frozen=True)
class Catalogue:
    """Items in key order. ``keys[m]`` is the m-th semantic ID, its items are rows ``first_row[m]`` to ``first_row[m+1]``."""

    codec: SemanticIdCodec
    version: str
    items: pa.Table
    keys: np.ndarray
    first_row: np.ndarray
    rows_by_id: np.ndarray

    @classmethod
    def build(
        cls,
        item_ids: Sequence[str],
        codes: Any,
        codebook_sizes: Sequence[int],
        *,
        metadata: Mapping[str, Sequence[Any]] | None = None,
        weights: Sequence[float] | None = None,
        version: str | None = None,
    ) -> Catalogue:
        """Order items and index them.

        Args:
            item_ids: distinct, non-empty strings without ``>`` (they appear as ``<item:ID>`` in prompts).
            codes: integers [items, L]. Several items may have the same codes.
            codebook_sizes: T_1 … T_L.
            metadata: further columns, such as titles, one value an item.
            weights: order of items that share a semantic ID, largest first; default 0 for all.
            version: name of this state; default the first 12 digits of a hash of the content.

        Raises:
            CatalogueError: what is wrong with which item.
        """
        metadata = dict(metadata or {})
        codec = SemanticIdCodec(codebook_sizes)
        count = len(item_ids)
        codes = np.asarray(codes, dtype=np.int64).reshape(count, -1) if count else np.zeros((0, codec.num_levels), np.int64)
        _check_items(item_ids, codes, codec, metadata, weights)
        weight = np.zeros(count, np.float32) if weights is None else np.asarray(weights, np.float32)
        key = codec.key(codes)
        ids = pa.array(item_ids, pa.string())
        id_rank = np.empty(count, np.int64)
        id_rank[pc.sort_indices(ids).to_numpy()] = np.arange(count)
        order = np.lexsort((id_rank, -weight, key))
        key = key[order]
        keys, first = np.unique(key, return_index=True)
        flat_codes = pa.array(codes[order].astype(np.int32).ravel())
        columns = {
            "item_id": ids.take(pa.array(order)),
            "codes": pa.FixedSizeListArray.from_arrays(flat_codes, codec.num_levels),
            "weight": pa.array(weight[order]),
        }
        columns |= {name: pa.array(values).take(pa.array(order)) for name, values in metadata.items()}
        items = pa.table(columns)
        return cls(
            codec,
            version or _content_version(codec, items),
            items,
            keys,
            np.append(first, count).astype(np.int64),
            np.argsort(id_rank[order], kind="stable").astype(np.int64),
        )

    @property
    def num_items(self) -> int:
        return self.items.num_rows

    @property
    def num_ids(self) -> int:
        """Number of distinct semantic IDs."""
        return len(self.keys)

    @cached_property
    def _item_ids(self) -> pa.ChunkedArray:
        return self.items["item_id"].combine_chunks()

    @cached_property
    def codes(self) -> np.ndarray:
        """Codes of every row, int32 [items, L]."""
        flat = self.items["codes"].combine_chunks().flatten().to_numpy()
        return flat.reshape(self.num_items, self.codec.num_levels)

    def item_id(self, row: int) -> str:
        return self._item_ids[row].as_py()

    def row(self, item_id: str) -> int:
        """Row of an item. Raises ``UnknownItemError``."""
        ids, order = self._item_ids, self.rows_by_id
        at = bisect_left(order, item_id.encode(), key=lambda row: ids[row].as_buffer().to_pybytes())
        if at < len(order) and ids[int(order[at])].as_py() == item_id:
            return int(order[at])
        raise UnknownItemError(item_id)

    def codes_of(self, item_id: str) -> list[int]:
        """Codes of an item. Raises ``UnknownItemError``."""
        return self.codes[self.row(item_id)].tolist()

    def rows_of_index(self, index: int) -> range:
        """Rows of the items that share the ``index``-th semantic ID, in their defined order."""
        return range(int(self.first_row[index]), int(self.first_row[index + 1]))

    def metadata(self, row: int) -> dict[str, Any]:
        """Metadata columns of one row."""
        names = [name for name in self.items.column_names if name not in RESERVED_COLUMNS]
        return {name: self.items[name][row].as_py() for name in names}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder; it appears complete or not at all. An existing catalogue there is replaced."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with pa.OSFile(str(scratch / ITEMS), "wb") as sink, pa.ipc.new_file(sink, self.items.schema) as writer:
                writer.write_table(self.items.combine_chunks())
            arrays = {"keys": self.keys, "first_row": self.first_row, "rows_by_id": self.rows_by_id}
            save_file(arrays, scratch / KEYS)
            manifest = {
                "format": FORMAT,
                "version": self.version,
                "codebook_sizes": list(self.codec.codebook_sizes),
                "num_items": self.num_items,
                "num_ids": self.num_ids,
                "files": {name: _fingerprint(scratch / name) for name in (ITEMS, KEYS)},
            }
            (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            scratch.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Catalogue:
        """Read and verify a catalogue folder; items are memory-mapped. Raises ``CatalogueError``."""
        folder = Path(folder)
        manifest = _read_manifest(folder)
        codec = SemanticIdCodec(manifest["codebook_sizes"])
        for name in (ITEMS, KEYS):
            _check_file(folder / name, manifest["files"].get(name))
        try:
            arrays = load_file(folder / KEYS)
            with pa.memory_map(str(folder / ITEMS)) as source:
                items = pa.ipc.open_file(source).read_all()
            catalogue = cls(
                codec, str(manifest["version"]), items, arrays["keys"], arrays["first_row"], arrays["rows_by_id"]
            )
            catalogue._verify(manifest)
        except CatalogueError as error:
            raise CatalogueError(f"catalogue {folder}: {error}; {_REBUILD}") from None
        except (KeyError, OSError, ValueError, pa.ArrowException) as error:
            raise CatalogueError(f"catalogue {folder} cannot be read: {error}; {_REBUILD}") from error
        return catalogue

    def _verify(self, manifest: dict[str, Any]) -> None:
        counts = (self.num_items, self.num_ids)
        if counts != (manifest["num_items"], manifest["num_ids"]):
            raise CatalogueError(f"{MANIFEST} promises other counts than the files hold, {counts}")
        missing = [name for name in RESERVED_COLUMNS if name not in self.items.column_names]
        if missing:
            raise CatalogueError(f"{ITEMS} lacks the columns {missing}")
        self.codec.check_codes(self.codes)
        if self.num_ids == 0 or bool((np.diff(self.keys) <= 0).any()):
            raise CatalogueError(f"{KEYS}: keys must be ascending and at least one")
        sizes = np.diff(self.first_row)
        if self.first_row[0] != 0 or self.first_row[-1] != self.num_items or bool((sizes < 1).any()):
            raise CatalogueError(f"{KEYS}: first_row does not cover the items")
        if not np.array_equal(np.repeat(self.keys, sizes), self.codec.key(self.codes)):
            raise CatalogueError(f"{KEYS} and {ITEMS} disagree on the items' semantic IDs")
        if not np.array_equal(np.sort(self.rows_by_id), np.arange(self.num_items)):
            raise CatalogueError(f"{KEYS}: rows_by_id is not an order of the items")


_REBUILD = "write it again with Catalogue.save or `nezha tokenize`"


def load_keys(folder: str | os.PathLike[str]) -> tuple[SemanticIdCodec, str, np.ndarray]:
    """Codec, version and sorted keys alone: what an engine process needs. Raises ``CatalogueError``."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    _check_file(folder / KEYS, manifest["files"].get(KEYS))
    keys = load_file(folder / KEYS)["keys"]
    return SemanticIdCodec(manifest["codebook_sizes"]), str(manifest["version"]), keys


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CatalogueError(
            f"no catalogue at {folder}: {path} is missing; build one with `nezha tokenize`, or set `catalogue` in the "
            "checkpoint's config.json to its folder"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CatalogueError(f"{path}: format {manifest['format']} is not {FORMAT}, the one this version reads")
        SemanticIdCodec(manifest["codebook_sizes"])
        absent = {"version", "num_items", "num_ids", "files"} - manifest.keys()
        if absent:
            raise CatalogueError(f"{path}: {sorted(absent)} missing; {_REBUILD}")
    except CatalogueError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CatalogueError(f"{path} is damaged ({error!r}); {_REBUILD}") from error
    return manifest


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check_file(path: Path, expected: dict[str, Any] | None) -> None:
    if expected is None or not path.is_file():
        raise CatalogueError(f"{path} is missing; {_REBUILD}")
    if _fingerprint(path) != expected:
        raise CatalogueError(f"{path} is damaged: its size or checksum is not the one in {MANIFEST}; {_REBUILD}")


def _content_version(codec: SemanticIdCodec, items: pa.Table) -> str:
    digest = hashlib.sha256(repr(codec.codebook_sizes).encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, items.schema) as writer:
        writer.write_table(items.combine_chunks())
    digest.update(sink.getvalue())
    return digest.hexdigest()[:12]


def _check_items(
    item_ids: Sequence[str],
    codes: np.ndarray,
    codec: SemanticIdCodec,
    metadata: Mapping[str, Sequence[Any]],
    weights: Sequence[float] | None,
) -> None:
    if len(item_ids) == 0:
        raise CatalogueError("a catalogue needs at least one item")
    for row, item_id in enumerate(item_ids):
        if not isinstance(item_id, str) or not item_id or ">" in item_id:
            raise CatalogueError(f"item ID {item_id!r} in row {row} must be a non-empty string without '>'")
    if len(set(item_ids)) != len(item_ids):
        seen: set[str] = set()
        twice = next(item_id for item_id in item_ids if item_id in seen or seen.add(item_id))
        raise CatalogueError(f"item ID {twice!r} appears more than once")
    try:
        codec.check_codes(codes)
    except ValueError as error:
        raise CatalogueError(str(error)) from None
    for name, values in metadata.items():
        if name in RESERVED_COLUMNS:
            raise CatalogueError(f"metadata column {name!r} has a reserved name; rename it")
        if len(values) != len(item_ids):
            raise CatalogueError(f"metadata column {name!r} has {len(values)} values for {len(item_ids)} items")
    if weights is not None and (len(weights) != len(item_ids) or not np.isfinite(np.asarray(weights, float)).all()):
        raise CatalogueError("weights must be finite numbers, one an item")
