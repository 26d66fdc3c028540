"""Index files in the LETTER format: one JSON object, item → ``["<a_12>", "<b_7>", …]``, or item → ``[12, 7, …]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nezha_vllm.data.json_files import read_whole
from nezha_vllm.data.lines import BrokenLines
from nezha_vllm.semantic_id import LEVEL_NAMES

TOKEN = re.compile(r"<([a-z])_(\d+)>")


def read_index(path: Path, offset: int = 0) -> tuple[list[str], np.ndarray]:
    """Item IDs and their codes [items, L].

    Args:
        offset: added to the item IDs, which must then be whole numbers. Often they count from 0 here and from 1 in the
            interactions.

    Raises:
        FileNotFoundError: no file.
        ValueError: no such format, naming the first item that is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no index file {path}")
    rows = read_whole(path, BrokenLines(0))
    if not rows:
        raise ValueError(f"{path} holds no items")
    ids, codes = [], []
    for key, tokens in rows.items():
        try:
            ids.append(str(int(key) + offset) if offset else key)
            codes.append(_codes(tokens))
            if len(codes[-1]) != len(codes[0]):
                raise ValueError(f"{len(codes[-1])} codes, the first item has {len(codes[0])}")
        except ValueError as error:
            raise ValueError(f"{path}: item {key!r}: {error}") from None
    return ids, np.array(codes, np.int64)


def smallest_sizes(codes: np.ndarray) -> list[int]:
    """One codebook size for all levels: the least power of two that holds every code."""
    return [1 << int(codes.max()).bit_length()] * codes.shape[1]


def codes_by_item(item_ids: Sequence[str], index_ids: Sequence[str], codes: np.ndarray, path: Path) -> np.ndarray:
    """Codes [items, L] in the order of ``item_ids``. Raises ``ValueError`` if some of them are not in the index."""
    row = {item: at for at, item in enumerate(index_ids)}
    missing = [item for item in item_ids if item not in row]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing):,} of {len(item_ids):,} items, such as {missing[0]!r}; its IDs go from "
            f"{index_ids[0]!r} to {index_ids[-1]!r}: shift them with --index-offset, or name the index of this data set"
        )
    return codes[[row[item] for item in item_ids]]


def _codes(tokens: Any) -> list[int]:
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{tokens!r} is no list of codes")
    found = []
    for level, token in enumerate(tokens):
        match = TOKEN.fullmatch(token) if isinstance(token, str) else None
        if match and match[1] == LEVEL_NAMES[level]:
            found.append(int(match[2]))
        elif isinstance(token, int) and not isinstance(token, bool) and token >= 0:
            found.append(token)
        else:
            raise ValueError(f"{token!r} is no code of level {level + 1}, such as <{LEVEL_NAMES[level]}_12> or 12")
    return found
