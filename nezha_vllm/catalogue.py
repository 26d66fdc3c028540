"""The catalogue: which items exist, which semantic ID each has, and how both are kept on disk.

A catalogue is a folder of three files:

* ``manifest.json``: format, version, codebook sizes, counts, the size and SHA-256 of the other two
  files, and ``checksum``, the SHA-256 of all this (the manifest without it, as JSON with sorted keys);
* ``items.arrow``: one row an item in an uncompressed, memory-mappable Arrow IPC file, with ``item_id`` (string),
  ``codes`` (fixed-size list of int32), ``weight`` (float32) and any metadata columns;
* ``keys.safetensors``: ``keys`` int64 [M], the distinct semantic IDs in ascending key order (see ``semantic_id``);
  ``first_row`` int64 [M + 1], where each ID's items start; ``rows_by_id`` int64 [items], rows in order of item ID.

Rows are ordered by key, then by weight (largest first), then by item ID: items that share a semantic ID have one
defined order.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nezha_vllm.folders import check_replaceable, replacing
from nezha_vllm.item_index import ItemIndex, UnknownItemError
from nezha_vllm.manifest import MANIFEST, REBUILD, CatalogueError, check_file, read_steadily, write_manifest
from nezha_vllm.semantic_id import SemanticIdCodec

ITEMS, KEYS = "items.arrow", "keys.safetensors"
ARRAYS = ("keys", "first_row", "rows_by_id")
RESERVED_COLUMNS = ("item_id", "codes", "weight")


__all__ = ["Catalogue", "CatalogueError", "UnknownItemError", "load_keys"]


@dataclass(frozen=True)
class Catalogue:
    """Items in key order; the m-th semantic ID is ``keys[m]``, its items ``first_row[m]`` to ``first_row[m + 1]``."""

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
        codes = _check_items(item_ids, codes, codec, metadata, weights)
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
    def _item_ids(self) -> pa.StringArray:
        return _one_array(self.items["item_id"])

    @cached_property
    def _index(self) -> ItemIndex:
        return ItemIndex(self._item_ids, self.rows_by_id)

    @cached_property
    def codes(self) -> np.ndarray:
        """Codes of every row, int32 [items, L]."""
        flat = _one_array(self.items["codes"]).flatten().to_numpy()
        return flat.reshape(self.num_items, self.codec.num_levels)

    def item_id(self, row: int) -> str:
        return self._index.ids([row])[0]

    def item_ids(self, rows: Iterable[int]) -> list[str]:
        return self._index.ids(rows)

    def row(self, item_id: str) -> int:
        """Row of an item. Raises ``UnknownItemError``."""
        return self._index.rows([item_id])[0]

    def rows(self, item_ids: Sequence[str]) -> list[int]:
        """Rows of items. Raises ``UnknownItemError`` for the first that is unknown."""
        return self._index.rows(item_ids)

    def codes_of(self, item_id: str) -> list[int]:
        """Codes of an item. Raises ``UnknownItemError``."""
        return self.codes[self.row(item_id)].tolist()

    def rows_of_index(self, index: int) -> range:
        """Rows of the items that share the ``index``-th semantic ID, in their defined order."""
        first = self._first_rows
        return range(first[index], first[index + 1])

    @cached_property
    def _first_rows(self) -> memoryview:
        return np.ascontiguousarray(self.first_row).data  # its elements are Python's integers

    def metadata(self, row: int) -> dict[str, Any]:
        """Metadata columns of one row."""
        names = [name for name in self.items.column_names if name not in RESERVED_COLUMNS]
        return {name: self.items[name][row].as_py() for name in names}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder; it appears complete or not at all. An existing catalogue there is replaced.

        Raises ``CatalogueError`` rather than replace anything else.
        """
        folder = Path(folder).resolve()  # through a symbolic link, what it points to is replaced
        try:
            check_replaceable(folder, MANIFEST)
        except ValueError:
            raise CatalogueError(
                f"{folder} exists and is no catalogue; name another folder, or remove it first"
            ) from None
        with replacing(folder, MANIFEST) as scratch:
            with pa.OSFile(str(scratch / ITEMS), "wb") as sink, pa.ipc.new_file(sink, self.items.schema) as writer:
                writer.write_table(self.items.combine_chunks())
            save_file({name: getattr(self, name) for name in ARRAYS}, scratch / KEYS)
            write_manifest(
                scratch,
                (ITEMS, KEYS),
                version=self.version,
                codebook_sizes=list(self.codec.codebook_sizes),
                num_items=self.num_items,
                num_ids=self.num_ids,
            )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Catalogue:
        """Read and verify a catalogue folder; items are memory-mapped. Raises ``CatalogueError``."""
        folder = Path(folder)
        return read_steadily(folder, lambda manifest: cls._load(folder, manifest))

    @classmethod
    def _load(cls, folder: Path, manifest: dict[str, Any]) -> Catalogue:
        for name in (ITEMS, KEYS):
            check_file(folder / name, manifest)
        try:
            arrays = load_file(folder / KEYS)
            with pa.memory_map(str(folder / ITEMS)) as source:
                items = pa.ipc.open_file(source).read_all()
            codec = SemanticIdCodec(manifest["codebook_sizes"])
            catalogue = cls(codec, manifest["version"], items, *(arrays[name] for name in ARRAYS))
            catalogue._verify(manifest)
        except _UNREADABLE as error:
            raise CatalogueError(f"catalogue {folder} cannot be read: {error}; {REBUILD}") from error
        return catalogue

    def _verify(self, manifest: dict[str, Any]) -> None:
        """Raise ``CatalogueError`` unless every law of the format holds; files may come from another writer."""
        _check_keys(self.keys, manifest)
        columns = {"item_id": pa.string(), "codes": pa.list_(pa.int32(), self.codec.num_levels), "weight": pa.float32()}
        for name, kind in columns.items():
            if name not in self.items.column_names or self.items[name].type != kind or self.items[name].null_count:
                raise CatalogueError(f"{ITEMS} needs a column {name!r} of type {kind} without nulls")
        if self.num_items != manifest["num_items"]:
            raise CatalogueError(f"{ITEMS} has {self.num_items} items, {MANIFEST} promises {manifest['num_items']}")
        self.codec.check_codes(self.codes)
        sizes = np.diff(self.first_row)
        if len(sizes) != self.num_ids or self.first_row[0] != 0 or sizes.min() < 1 or sizes.sum() != self.num_items:
            raise CatalogueError(f"{KEYS}: first_row does not cover the items")
        if not np.array_equal(np.repeat(self.keys, sizes), self.codec.key(self.codes)):
            raise CatalogueError(f"{KEYS} and {ITEMS} disagree on the items' semantic IDs")
        if not np.array_equal(np.sort(self.rows_by_id), np.arange(self.num_items)):
            raise CatalogueError(f"{KEYS}: rows_by_id is not an order of the items")
        sorted_ids = self._item_ids.take(pa.array(self.rows_by_id))
        if not pc.all(pc.less(sorted_ids[:-1], sorted_ids[1:]), min_count=0).as_py():  # one item has no pairs
            raise CatalogueError(f"{KEYS}: rows_by_id is not in the order of item IDs, or an ID appears twice")


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array: where it lies if it is one (`combine_chunks` always copies), else a copy."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


_UNREADABLE = (KeyError, IndexError, OSError, ValueError, pa.ArrowException, SafetensorError)


def load_keys(folder: str | os.PathLike[str]) -> tuple[SemanticIdCodec, str, np.ndarray]:
    """Codec, version and sorted keys alone: what an engine process needs. Raises ``CatalogueError``."""
    folder = Path(folder)
    return read_steadily(folder, lambda manifest: _load_keys(folder / KEYS, manifest))


def _load_keys(path: Path, manifest: dict[str, Any]) -> tuple[SemanticIdCodec, str, np.ndarray]:
    check_file(path, manifest)
    try:
        keys = load_file(path)["keys"]
        _check_keys(keys, manifest)
    except _UNREADABLE as error:
        raise CatalogueError(f"{path} cannot be read: {error}; {REBUILD}") from error
    return SemanticIdCodec(manifest["codebook_sizes"]), manifest["version"], keys


def _check_keys(keys: np.ndarray, manifest: dict[str, Any]) -> None:
    if keys.dtype != np.int64 or keys.ndim != 1 or len(keys) == 0 or bool((np.diff(keys) <= 0).any()):
        raise CatalogueError(f"{KEYS}: keys must be int64, ascending and at least one")
    if len(keys) != manifest["num_ids"]:
        raise CatalogueError(f"{KEYS} has {len(keys)} semantic IDs, {MANIFEST} promises {manifest['num_ids']}")


def _content_version(codec: SemanticIdCodec, items: pa.Table) -> str:
    digest = hashlib.sha256(repr(codec.codebook_sizes).encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, items.schema) as writer:
        writer.write_table(items.combine_chunks())
    digest.update(sink.getvalue())
    return digest.hexdigest()[:12]


def _check_items(
    item_ids: Sequence[str],
    codes: Any,
    codec: SemanticIdCodec,
    metadata: Mapping[str, Sequence[Any]],
    weights: Sequence[float] | None,
) -> np.ndarray:
    """Raise ``CatalogueError``, or return the codes as an int64 array [items, L]."""
    count = len(item_ids)
    if count == 0:
        raise CatalogueError("a catalogue needs at least one item")
    for row, item_id in enumerate(item_ids):
        if not isinstance(item_id, str) or not item_id or ">" in item_id or not _is_unicode(item_id):
            raise CatalogueError(f"item ID {item_id!r} in row {row} must be a non-empty Unicode string without '>'")
    if len(set(item_ids)) != count:
        twice, times = Counter(item_ids).most_common(1)[0]
        raise CatalogueError(f"item ID {twice!r} appears {times} times")
    if max(codec.codebook_sizes) > 2**31:
        raise CatalogueError(f"codes are kept as int32, but codebook sizes are {codec.codebook_sizes}")
    try:
        codes = np.asarray(codes)
        if codes.shape != (count, codec.num_levels) or codes.dtype.kind not in "iu":
            raise ValueError(
                f"codes must be integers of shape {(count, codec.num_levels)}: a row an item, a column a level; "
                f"got {codes.dtype} of shape {codes.shape}"
            )
        codec.check_codes(codes)
    except ValueError as error:
        raise CatalogueError(str(error)) from None
    for name, values in metadata.items():
        if name in RESERVED_COLUMNS:
            raise CatalogueError(f"metadata column {name!r} has a reserved name; rename it")
        if len(values) != count:
            raise CatalogueError(f"metadata column {name!r} has {len(values)} values for {count} items")
    if weights is not None and (len(weights) != count or not np.isfinite(np.asarray(weights, np.float32)).all()):
        raise CatalogueError("weights must be finite float32 numbers, one an item")
    return codes.astype(np.int64)


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON may carry but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
