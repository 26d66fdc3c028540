"""The draft head's equations, written out once more in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import key_sets, small_codebooks
from test_beam_search import shares_among_items

from nezha_vllm.draft_head import DraftHead, among_items
from nezha_vllm.semantic_id import SemanticIdCodec


@pytest.fixture
def head() -> DraftHead:
    torch.manual_seed(0)
    return DraftHead(5, (4, 7, 3), dtype=torch.float64).requires_grad_(False)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum())


def test_teacher_forcing_follows_the_equations(head):
    hidden = torch.randn(6, 4, 5, dtype=torch.float64)
    codes = torch.stack([torch.randint(size, (6,)) for size in head.codebook_sizes], dim=1)
    outputs = head(hidden, codes)
    weights = {name: tensor.numpy() for name, tensor in head.state_dict().items()}
    for row in range(6):
        h, state = hidden[row].numpy(), hidden[row, 0].numpy()
        for level in range(3):
            expected = log_softmax(weights[f"logit_heads.{level}.weight"] @ (state + h[level + 1]))
            np.testing.assert_allclose(outputs[level][row], expected, atol=1e-6)
            if level < 2:
                cell = f"cells.{level}"
                embedding = weights[f"code_embeddings.{level}.weight"][codes[row, level]]
                state = np.tanh(
                    weights[f"{cell}.weight_ih"] @ embedding
                    + weights[f"{cell}.bias_ih"]
                    + weights[f"{cell}.weight_hh"] @ state
                    + weights[f"{cell}.bias_hh"]
                )


@given(st.data())
def test_a_softmax_over_the_catalogue_shares_out_what_the_items_have(data):
    sizes = data.draw(small_codebooks(max_levels=4))
    keys = data.draw(key_sets(sizes, 100))
    codes = torch.from_numpy(SemanticIdCodec(sizes).codes_of_key(keys))
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    logits = [torch.randn(len(keys), size, requires_grad=True) for size in sizes]
    found = among_items([scores.log_softmax(-1) for scores in logits], codes, torch.from_numpy(keys))
    for level, scores in enumerate(logits):
        expected = shares_among_items(scores.detach().log_softmax(-1), codes, level)
        torch.testing.assert_close(found[level], expected, atol=1e-5, rtol=1e-5)
    sum(log_p.gather(1, codes[:, level, None]).sum() for level, log_p in enumerate(found)).backward()
    for level, scores in enumerate(logits):
        assert torch.isfinite(scores.grad).all()
        assert (scores.grad[found[level] == -torch.inf].abs() < 1e-5).all(), "nothing is learnt of codes without items"


def test_the_last_level_has_no_state_to_hand_on(head):
    assert len(head.code_embeddings) == len(head.cells) == 2
    assert [tuple(drive.shape) for drive in head.code_drives()] == [(4, 5), (7, 5)]


def test_the_cell_is_torchs_own(head):
    state, codes = torch.randn(8, 5, dtype=torch.float64), torch.randint(7, (8,))
    torch.testing.assert_close(head.next_state(1, state, codes), head.cells[1](head.code_embeddings[1](codes), state))


def test_log_probabilities_are_float32_in_every_weight_type():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        head = DraftHead(8, (4, 4), dtype=dtype)
        outputs = head(torch.randn(2, 3, 8, dtype=dtype), torch.zeros(2, 2, dtype=torch.long))
        assert {output.dtype for output in outputs} == {torch.float32}
        torch.testing.assert_close(outputs[1].exp().sum(-1), torch.ones(2))
