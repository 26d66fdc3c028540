"""A table of histories → a table of recommendations, by one vLLM engine of this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from nezha_vllm.arrow_rows import rows_of
from nezha_vllm.batch.columns import OPTIONS, RESULTS, Columns, options_of
from nezha_vllm.client import prompt as prompt_of

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


class Scorer:
    """Answers rows as the API answers requests; a row that the API would refuse gets the message as its ``error``.

    Args:
        llm: an engine with a NEZHA checkpoint.
        columns: what the tables' columns mean.
        options: for rows that do not set them themselves: ``n`` and whatever ``vllm_xargs`` takes.
        last: how many of the latest items of a history to use; default: all.

    Raises:
        ValueError: an option that does not exist.
    """

    def __init__(
        self, llm: LLM, columns: Columns, options: Mapping[str, Any] | None = None, last: int | None = None
    ) -> None:
        self.llm, self.columns, self.last = llm, columns, last
        self.options = {"n": 10, **(options or {})}
        check_options(self.options, last)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows in, as many rows out, in the same order."""
        from vllm.exceptions import VLLMValidationError

        results: list[dict[str, Any]] = [{} for _ in range(len(table))]
        asked = []
        for at, row in enumerate(rows_of(table.select(self.columns.asked))):
            try:
                self.llm.enqueue(*self.request(row), use_tqdm=False)
                asked.append(at)
            except (ValueError, VLLMValidationError) as error:
                results[at] = {"error": str(error)}
        outputs = self.llm.wait_for_completion(use_tqdm=False)
        for at, output in zip(asked, outputs, strict=True):
            results[at] = _result(output)
        kept = table.select(self.columns.kept)
        found = pa.Table.from_pylist(results, RESULTS)
        arrays = [*kept.columns, *found.columns]
        return pa.Table.from_arrays(arrays, schema=self.columns.output_schema(table.schema))

    def request(self, row: dict[str, Any] | ValueError) -> tuple[list[Any], SamplingParams]:
        """Prompt and parameters of a row. Raises what the API makes a 400 of."""
        from vllm import SamplingParams

        from nezha_vllm.frontend.errors import bad_request

        if isinstance(row, ValueError):
            raise bad_request("row", f"the row cannot be read: {row}")
        options = {**self.options, **options_of(row, self.columns.options)}
        n = options.pop("n")
        if type(n) is not int or n < 1:
            raise bad_request("n", f"n must be a whole number of at least 1, got {n!r}")
        return [{"prompt": self._text(row[self.columns.source])}], SamplingParams(n=n, extra_args=options)

    def _text(self, source: Any) -> str:
        from nezha_vllm.frontend.errors import bad_request

        name = self.columns.source
        if source is None:
            raise bad_request(name, f"{name} is null")
        if self.columns.is_prompt:
            return source
        history = source[-self.last :] if self.last else source
        for item in history:
            if item is None or item == "" or ">" in str(item):
                raise bad_request(name, f"{name} has {item!r}, which is no item ID")
        return prompt_of(history)


def check_options(options: Mapping[str, Any], last: int | None) -> None:
    """Raise ``ValueError`` for an option that does not exist; its value is checked with every row."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"{unknown} are no options; there are {', '.join(OPTIONS)}")
    if last is not None and last < 1:
        raise ValueError(f"last is {last}, must be at least 1")


def _result(output: Any) -> dict[str, Any]:
    items = output.outputs
    return {
        "item_ids": [item.text for item in items],
        "scores": [item.cumulative_logprob for item in items],
        "semantic_ids": [item.semantic_id for item in items],
        "catalogue_version": output.nezha.catalogue_version,
        "reason": output.nezha.reason,
        "error": None,
    }
