"""Item scores by the Triton kernels against the PyTorch reference, where `test_kernels.py` runs, too."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch
from kernel_cases import SHAPES, assert_same, items_of, make

from nezha_vllm import triton_items


@pytest.mark.parametrize(
    ("sizes", "keys", "widths", "stepwise", "known"),
    [(*shape, known) for shape, known in zip(SHAPES, cycle([0.6, 1, 0]), strict=False)],
    ids=str,
)
def test_item_scores_equal_the_reference(sizes, keys, widths, stepwise, known):
    case = make(sizes, keys, widths, stepwise, known=known)
    found = case.search()
    assert_same(found, case.reference())
    for log_probs_KL, valid in zip(found.log_probs_NKL, found.valid_N.tolist(), strict=True):
        scores = sum(log_probs_KL[:valid].unbind(1)).tolist()
        assert scores == sorted(scores, reverse=True), "in the order of what is written out"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_items_may_be_of_another_type(dtype):
    case = make((7, 13, 5), 100, [9, 12], [True, False])
    case.items = items_of(case, 0.5, dtype=dtype)
    assert_same(case.search(), case.reference())


@pytest.mark.parametrize("bits", [1, 5])
def test_item_tokens_are_found_whatever_the_table(monkeypatch, bits):
    """Two buckets and thirty-two: the search goes on in what lies below one."""
    case = make((7, 13, 5), 200, [15], [True], known=0.8)
    expected = case.search()
    monkeypatch.setattr(triton_items, "TABLE_BITS", bits)
    found = case.search()
    assert torch.equal(found.index_NK, expected.index_NK)
    assert torch.equal(found.scores_NK, expected.scores_NK)


@pytest.mark.parametrize("known", [0, 1])
def test_items_of_equal_scores_come_in_order_of_semantic_id(known):
    """The same vector for all items, whether it is a token's or the sum of their codes'."""
    case = make((7, 13, 5), 120, [9, 20], [True, False], kind="flat", known=known)
    assert case.items is not None
    vectors, codes = case.items.embeddings, case.items.code_rows
    codes[:7] = vectors[25:] = vectors[0].clone()
    codes[7:] = 0
    found, expected = case.search(), case.reference()
    assert torch.equal(found.index_NK[:, : expected.index_NK.shape[1]], expected.index_NK)
    for index, valid in zip(found.index_NK.tolist(), found.valid_N.tolist(), strict=True):
        assert index[:valid] == sorted(index[:valid])
        assert valid > 0


def test_an_item_whose_vector_is_no_number_lets_nothing_in_that_is_no_item():
    case = make((7, 13, 5), 200, [12, 16], [True, False], known=1)
    assert case.items is not None
    expected = case.search()
    spoilt = int(expected.index_NK[0, 0])
    at = torch.searchsorted(case.items.keys, case.keys_M[spoilt])
    case.items.embeddings[case.items.first + at] = torch.nan
    for found, (request, valid) in product([case.search(), case.reference()], enumerate(expected.valid_N.tolist())):
        items, others = found.index_NK[request, :valid].tolist(), expected.index_NK[request, :valid].tolist()
        assert sorted(items) == sorted(others)
        if spoilt in others:
            assert items == [item for item in others if item != spoilt] + [spoilt]
