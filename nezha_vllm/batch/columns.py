"""Which column of a table means what. Knows Arrow only: whoever drives a job needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

# a request's options under their names of the API (frontend.options.OPTIONS), and the number of items
OPTIONS = (
    *("n", "beam_width", "validity"),
    *("exclude_items", "allow_items", "exclude_history", "segments", "exclude_segments", "min_score", "max_per_id"),
)
WHOLE = ("n", "beam_width", "max_per_id")  # whole numbers
RESULTS = pa.schema(
    [
        ("item_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("semantic_ids", pa.list_(pa.list_(pa.int32()))),
        ("catalogue_version", pa.string()),
        ("reason", pa.string()),
        ("error", pa.string()),
    ]
)


class ColumnError(ValueError):
    """The input's columns do not say what to recommend for; the message has the remedy."""


@dataclass(frozen=True)
class Columns:
    """``source`` holds histories (lists of item IDs), or texts as the API's ``prompt``; ``kept`` are copied."""

    source: str
    is_prompt: bool
    options: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def asked(self) -> list[str]:
        """Columns whose values are looked at; the others are copied as they are."""
        return [self.source, *self.options]

    @property
    def read(self) -> list[str]:
        """All columns that are needed from the file."""
        return [*self.asked, *self.kept]

    def output_schema(self, schema: pa.Schema) -> pa.Schema:
        return pa.schema([*(schema.field(name) for name in self.kept), *RESULTS])


def find_columns(schema: pa.Schema, history: str = "history", prompt: str | None = None) -> Columns:
    """Columns of an input with this schema: the history or prompt, options by their names, the rest to keep.

    Raises ``ColumnError``.
    """
    source = prompt if prompt is not None else history
    if schema.names.count(source) != 1:
        raise ColumnError(f"the input has no column {source!r}, it has {schema.names}; name yours with --history")
    kind = schema.field(source).type
    if prompt is not None and not _is_text(kind):
        raise ColumnError(f"column {source!r} holds {kind}; prompts are strings")
    if prompt is None and not _is_history(kind):
        raise ColumnError(
            f"column {source!r} holds {kind}; histories are lists of item IDs, strings or integers, oldest first. A "
            "column of texts is named with --prompt"
        )
    options = tuple(name for name in OPTIONS if name in schema.names and name != source)
    kept = tuple(name for name in schema.names if name not in (source, *options))
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    taken = sorted(set(kept) & set(RESULTS.names))
    if twice or taken:
        raise ColumnError(f"columns {twice or taken} would be there twice in the output; rename them in the input")
    return Columns(source, prompt is not None, options, kept)


def options_of(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A row's options: what is null is not set, and pandas' 512.0 for a whole number in a column with gaps is 512."""
    found = {name: row[name] for name in names if row[name] is not None and row[name] == row[name]}
    for name in WHOLE:
        if isinstance(found.get(name), float) and found[name].is_integer():
            found[name] = int(found[name])
    return found


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_history(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return _is_text(kind.value_type) or pa.types.is_integer(kind.value_type)
