"""The catalogue: which items exist, which semantic ID each has, and how both are kept on disk.

A catalogue is a folder of three files:

* ``manifest.json``: format, version, codebook sizes, counts, the size and SHA-256 of the other two
  files, and ``checksum``, the SHA-256 of all this (the manifest without it, as JSON with sorted keys);
* ``items.arrow``: one row an item in an uncompressed, memory-mappable Arrow IPC file, with ``item_id`` (string),
  ``codes`` (fixed-size list of int32), ``weight`` (float32), any metadata columns, and a boolean column
  ``segment:NAME`` for each segment;
* ``keys.safetensors``: ``keys`` int64 [M], the distinct semantic IDs in ascending key order (see ``semantic_id``);
  ``first_row`` int64 [M + 1], where each ID's items start; ``rows_by_id`` int64 [items], rows in order of item ID.

Rows are ordered by key, then by weight (largest first), then by item ID: items that share a semantic ID have one
defined order.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from nezha_vllm.catalogue_checks import (
    ARRAYS,
    ITEMS,
    KEYS,
    RESERVED_COLUMNS,
    check_first_row,
    check_keys,
    check_loaded,
    check_parts,
    check_policy,
)
from nezha_vllm.columns import check_distinct, item_id_column, metadata_column, one_array
from nezha_vllm.folders import check_replaceable, replacing
from nezha_vllm.item_index import ItemIndex, UnknownItemError
from nezha_vllm.manifest import MANIFEST, REBUILD, CatalogueError, check_file, write_manifest
from nezha_vllm.pointer import read_steadily
from nezha_vllm.runs import starts
from nezha_vllm.segments import PREFIX, Segments, check_segments, segment_columns
from nezha_vllm.semantic_id import SemanticIdCodec

__all__ = [
    "ITEMS",
    "KEYS",
    "MANIFEST",
    "RESERVED_COLUMNS",
    "Catalogue",
    "CatalogueError",
    "UnknownItemError",
    "load_keys",
]


@dataclass(frozen=True)
class Catalogue:
    """Items in key order; the m-th semantic ID is ``keys[m]``, its items ``first_row[m]`` to ``first_row[m + 1]``.

    ``shared_ids`` is how items of one semantic ID come out, see ``sharing.ranked_rows``; None leaves it to the server.
    """

    codec: SemanticIdCodec
    version: str
    items: pa.Table
    keys: np.ndarray
    first_row: np.ndarray
    rows_by_id: np.ndarray
    shared_ids: str | None = None

    @classmethod
    def build(
        cls,
        item_ids: Sequence[str] | pa.Array,
        codes: Any,
        codebook_sizes: Sequence[int],
        *,
        metadata: Mapping[str, Sequence[Any] | pa.Array] | None = None,
        weights: Sequence[float] | np.ndarray | None = None,
        segments: Mapping[str, Sequence[bool] | np.ndarray | pa.Array] | None = None,
        shared_ids: str | None = None,
        version: str | None = None,
    ) -> Catalogue:
        """Order items and index them.

        Args:
            item_ids: distinct, non-empty strings without ``>`` (they appear as ``<item:ID>`` in prompts).
            codes: integers [items, L]. Several items may have the same codes.
            codebook_sizes: T_1 … T_L.
            metadata: further columns, such as titles, one value an item.
            weights: order of items that share a semantic ID, largest first; default 0 for all.
            segments: named sets of items that requests may ask for, one true or false an item.
            shared_ids: one of ``SHARED_ID_POLICIES``; None leaves it to the server's setting.
            version: name of this state; default the first 12 digits of a hash of the content.

        Raises:
            CatalogueError: what is wrong with which item.
        """
        metadata = dict(metadata or {})
        codec = SemanticIdCodec(codebook_sizes)
        ids = item_id_column(item_ids)
        count = len(ids)
        by_id = pc.sort_indices(ids).to_numpy()
        check_distinct(ids, ids.take(pa.array(by_id)))
        codes, weight = check_parts(count, codes, codec, metadata, weights)
        check_policy(shared_ids)
        in_segments = segment_columns(segments or {}, count)
        key = codec.key(codes)
        # one stable sort after the other, the last the most significant: half the time of lexsort
        order = by_id
        if weight.min() != weight.max():
            order = order[np.argsort(-weight[order], kind="stable")]
        order = order[np.argsort(key[order], kind="stable")].astype(np.int64)
        key = key[order]
        first = starts(key)
        row = np.empty(count, np.int64)
        row[order] = np.arange(count)
        take = pa.array(order)
        flat_codes = pa.array(codes[order].astype(np.int32).ravel())
        columns = {
            "item_id": ids.take(take),
            "codes": pa.FixedSizeListArray.from_arrays(flat_codes, codec.num_levels),
            "weight": pa.array(weight[order]),
        }
        columns |= {name: metadata_column(values).take(take) for name, values in metadata.items()}
        columns |= {name: values.take(take) for name, values in in_segments.items()}
        items = pa.table(columns)
        return cls(
            codec,
            version or _content_version(codec, items, shared_ids),
            items,
            key[first],
            np.append(first, count).astype(np.int64),
            row[by_id],
            shared_ids,
        )

    def policy(self, default: str) -> str:
        """How items of one semantic ID come out; ``default`` is the server's or checkpoint's setting."""
        return self.shared_ids or default

    @property
    def num_items(self) -> int:
        return self.items.num_rows

    @property
    def num_ids(self) -> int:
        """Number of distinct semantic IDs."""
        return len(self.keys)

    @cached_property
    def ids(self) -> pa.StringArray:
        """Item ID of every row."""
        return one_array(self.items["item_id"])

    @cached_property
    def _index(self) -> ItemIndex:
        return ItemIndex(self.ids, self.rows_by_id)

    @cached_property
    def codes(self) -> np.ndarray:
        """Codes of every row, int32 [items, L]."""
        flat = one_array(self.items["codes"]).flatten().to_numpy()
        return flat.reshape(self.num_items, self.codec.num_levels)

    @cached_property
    def weights(self) -> np.ndarray:
        """Weight of every row, float32."""
        return one_array(self.items["weight"]).to_numpy()

    @cached_property
    def segments(self) -> Segments:
        return Segments.of(self.items)

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

    def find_rows(self, item_ids: Sequence[str]) -> np.ndarray:
        """Rows of many items, int64, -1 for those that are unknown."""
        return self._index.find_many(item_ids)

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
        others = (*RESERVED_COLUMNS, *(PREFIX + name for name in self.segments.names))
        names = [name for name in self.items.column_names if name not in others]
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
            items = pa.table({name: one_array(self.items[name]) for name in self.items.column_names})
            with pa.OSFile(str(scratch / ITEMS), "wb") as sink, pa.ipc.new_file(sink, items.schema) as writer:
                writer.write_table(items)
            save_file({name: getattr(self, name) for name in ARRAYS}, scratch / KEYS)
            write_manifest(
                scratch,
                (ITEMS, KEYS),
                version=self.version,
                codebook_sizes=list(self.codec.codebook_sizes),
                num_items=self.num_items,
                num_ids=self.num_ids,
                **({"segments": self.segments.names} if self.segments.names else {}),
                **({"shared_ids": self.shared_ids} if self.shared_ids else {}),
            )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Catalogue:
        """Read and verify a catalogue folder, or the current version of a store; items are memory-mapped.

        Raises ``CatalogueError``.
        """
        return read_steadily(folder, cls._load)

    @classmethod
    def _load(cls, folder: Path, manifest: dict[str, Any]) -> Catalogue:
        for name in (ITEMS, KEYS):
            check_file(folder / name, manifest)
        try:
            arrays = load_file(folder / KEYS)
            items = _map_items(folder)
            codec = SemanticIdCodec(manifest["codebook_sizes"])
            keys, first_row, rows_by_id = (arrays[name] for name in ARRAYS)
            policy = manifest.get("shared_ids")
            catalogue = cls(codec, manifest["version"], items, keys, first_row, rows_by_id, policy)
            check_loaded(catalogue, manifest)
        except _UNREADABLE as error:
            raise CatalogueError(f"catalogue {folder} cannot be read: {error}; {REBUILD}") from error
        return catalogue


_UNREADABLE = (KeyError, IndexError, TypeError, OSError, ValueError, pa.ArrowException, SafetensorError)


class Keys(NamedTuple):
    """What an engine process needs of a catalogue. ``segments`` and ``first_row`` are None where it has no segments."""

    codec: SemanticIdCodec
    version: str
    keys: np.ndarray
    segments: Segments | None
    first_row: np.ndarray | None


def load_keys(folder: str | os.PathLike[str]) -> Keys:
    """Codec, version, sorted keys and segments, without the items. Raises ``CatalogueError``.

    Like ``Catalogue.load``, it takes a catalogue folder or a store.
    """
    return read_steadily(folder, _load_keys)


def _load_keys(folder: Path, manifest: dict[str, Any]) -> Keys:
    path, segments, first_row = folder / KEYS, None, None
    check_file(path, manifest)
    if manifest.get("segments"):
        check_file(folder / ITEMS, manifest)
    try:
        with safe_open(path, framework="numpy") as arrays:
            keys = arrays.get_tensor("keys")
            check_keys(keys, manifest)
            if manifest.get("segments"):
                path = folder / ITEMS
                first_row = arrays.get_tensor("first_row")
                check_first_row(first_row, manifest)
                items = _map_items(folder)
                check_segments(items, manifest)
                segments = Segments.of(items)
    except _UNREADABLE as error:
        raise CatalogueError(f"{path} cannot be read: {error}; {REBUILD}") from error
    return Keys(SemanticIdCodec(manifest["codebook_sizes"]), manifest["version"], keys, segments, first_row)


def _map_items(folder: Path) -> pa.Table:
    with pa.memory_map(str(folder / ITEMS)) as source:
        return pa.ipc.open_file(source).read_all()


def _content_version(codec: SemanticIdCodec, items: pa.Table, shared_ids: str | None) -> str:
    """Hash of codebook sizes, policy and the items as an Arrow IPC stream, of which no copy is made."""
    digest = hashlib.sha256(repr(codec.codebook_sizes).encode() + (shared_ids or "").encode())
    with pa.PythonFile(_Hashed(digest), mode="w") as sink, pa.ipc.new_stream(sink, items.schema) as writer:
        writer.write_table(items)
    return digest.hexdigest()[:12]


class _Hashed(io.RawIOBase):
    """A file whose content goes into a hash."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)
