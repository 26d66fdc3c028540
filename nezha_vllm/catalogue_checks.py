"""The laws of a catalogue, checked before one is built and when one is loaded; no law is checked item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nezha_vllm.columns import one_array
from nezha_vllm.manifest import MANIFEST, CatalogueError
from nezha_vllm.segments import PREFIX, check_segments
from nezha_vllm.semantic_id import SHARED_ID_POLICIES, SemanticIdCodec

if TYPE_CHECKING:
    from nezha_vllm.catalogue import Catalogue

ITEMS, KEYS = "items.arrow", "keys.safetensors"
ARRAYS = ("keys", "first_row", "rows_by_id")
RESERVED_COLUMNS = ("item_id", "codes", "weight")


def check_parts(
    count: int,
    codes: Any,
    codec: SemanticIdCodec,
    metadata: Mapping[str, Sequence[Any]],
    weights: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of ``count`` items as integers [items, L] and weights as float32 [items]. Raises ``CatalogueError``."""
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
        if name.startswith(PREFIX):
            raise CatalogueError(f"metadata column {name!r} is named like a segment; rename it or build it as one")
        if len(values) != count:
            raise CatalogueError(f"metadata column {name!r} has {len(values)} values for {count} items")
    weight = np.zeros(count, np.float32) if weights is None else np.asarray(weights, np.float32)
    if len(weight) != count or not np.isfinite(weight).all():
        raise CatalogueError("weights must be finite float32 numbers, one an item")
    return codes, weight


def check_policy(shared_ids: Any) -> None:
    """Raise ``CatalogueError`` for a policy that does not exist; None is no policy."""
    if shared_ids is not None and shared_ids not in SHARED_ID_POLICIES:
        raise CatalogueError(f"shared_ids is {shared_ids!r}, must be one of {SHARED_ID_POLICIES}")


def check_loaded(catalogue: Catalogue, manifest: dict[str, Any]) -> None:
    """Raise ``CatalogueError`` unless every law of the format holds; files may come from another writer."""
    codec, items = catalogue.codec, catalogue.items
    check_policy(catalogue.shared_ids)
    try:
        items.validate(full=True)  # offsets and UTF-8: reading through bad ones would crash
    except pa.ArrowException as error:
        raise CatalogueError(f"{ITEMS}: {error}") from None
    columns = {"item_id": pa.string(), "codes": pa.list_(pa.int32(), codec.num_levels), "weight": pa.float32()}
    for name, kind in columns.items():
        column = items[name] if items.column_names.count(name) == 1 else None
        if column is None or column.type != kind or column.null_count:
            raise CatalogueError(f"{ITEMS} needs a column {name!r} of type {kind} without nulls")
    if catalogue.num_items != manifest["num_items"]:
        raise CatalogueError(f"{ITEMS} has {catalogue.num_items} items, {MANIFEST} promises {manifest['num_items']}")
    if one_array(items["codes"]).flatten().null_count:
        raise CatalogueError(f"{ITEMS}: a code is null")
    codec.check_codes(catalogue.codes)
    check_keys(catalogue.keys, manifest)
    check_segments(items, manifest)
    check_first_row(catalogue.first_row, manifest)
    sizes = np.diff(catalogue.first_row)
    if catalogue.rows_by_id.dtype != np.int64 or catalogue.rows_by_id.ndim != 1:
        raise CatalogueError(f"{KEYS}: rows_by_id must be int64 of one dimension")
    if not np.array_equal(np.repeat(catalogue.keys, sizes), codec.key(catalogue.codes)):
        raise CatalogueError(f"{KEYS} and {ITEMS} disagree on the items' semantic IDs")
    _check_order(catalogue)


def _check_order(catalogue: Catalogue) -> None:
    rows, count = catalogue.rows_by_id, catalogue.num_items
    rank = np.full(count, -1, np.int64)
    if len(rows) == count and rows.min() >= 0 and rows.max() < count:
        rank[rows] = np.arange(count)
    if rank.min() < 0:
        raise CatalogueError(f"{KEYS}: rows_by_id is not an order of the items")
    ids, weight = catalogue.ids, catalogue.weights
    if pc.min(pc.binary_length(ids)).as_py() == 0 or pc.any(pc.match_substring(ids, ">")).as_py():
        raise CatalogueError(f"{ITEMS}: an item ID is empty or has a '>'")
    sorted_ids = ids.take(pa.array(rows))
    if not pc.all(pc.less(sorted_ids[:-1], sorted_ids[1:]), min_count=0).as_py():  # one item has no pairs
        raise CatalogueError(f"{KEYS}: rows_by_id is not the order of the item IDs in {ITEMS}, or an ID appears twice")
    if not np.isfinite(weight).all():
        raise CatalogueError(f"{ITEMS}: a weight is not finite")
    ordered = (weight[:-1] > weight[1:]) | ((weight[:-1] == weight[1:]) & (rank[:-1] < rank[1:]))
    ordered[catalogue.first_row[1:-1] - 1] = True  # from one semantic ID to the next
    if not ordered.all():
        raise CatalogueError(f"{ITEMS}: items of one semantic ID are not in the order of weight and item ID")


def check_first_row(first_row: np.ndarray, manifest: dict[str, Any]) -> None:
    """Raise ``CatalogueError`` unless the semantic IDs' rows are all rows of the items, one ID behind the other."""
    if first_row.dtype != np.int64 or first_row.ndim != 1:
        raise CatalogueError(f"{KEYS}: first_row must be int64 of one dimension")
    covers = len(first_row) == manifest["num_ids"] + 1 and (first_row[0], first_row[-1]) == (0, manifest["num_items"])
    if not covers or np.diff(first_row).min() < 1:
        raise CatalogueError(f"{KEYS}: first_row does not cover the items")


def check_keys(keys: np.ndarray, manifest: dict[str, Any]) -> None:
    """Raise ``CatalogueError`` unless the keys are sorted, distinct, in range and as many as promised."""
    if keys.dtype != np.int64 or keys.ndim != 1 or len(keys) == 0 or bool((keys[1:] <= keys[:-1]).any()):
        raise CatalogueError(f"{KEYS}: keys must be int64, ascending and at least one")
    if len(keys) != manifest["num_ids"]:
        raise CatalogueError(f"{KEYS} has {len(keys)} semantic IDs, {MANIFEST} promises {manifest['num_ids']}")
    if keys[0] < 0 or keys[-1] >= SemanticIdCodec(manifest["codebook_sizes"]).capacity:
        raise CatalogueError(f"{KEYS}: a key is outside the range of codebooks {manifest['codebook_sizes']}")
