"""Laws of the mixed-radix codec, against Python's unbounded integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import code_rows, wide_codebooks

from nezha_vllm.semantic_id import SemanticIdCodec, code_token, placeholder_token


def public_integer(codes: list[int], sizes: tuple[int, ...]) -> int:
    """V = Σ t_l Π_{j<l} T_j by Horner's rule from the last level, in unbounded integers."""
    value = 0
    for code, size in zip(reversed(codes), reversed(sizes), strict=True):
        value = value * size + code
    return value


@st.composite
def codebooks_and_rows(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray]:
    sizes = draw(wide_codebooks())
    return sizes, draw(code_rows(sizes))


@given(codebooks_and_rows())
def test_encode_and_key_agree_with_unbounded_integers(case):
    sizes, rows = case
    codec = SemanticIdCodec(sizes)
    expected_public = [public_integer(row, sizes) for row in rows.tolist()]
    expected_keys = [public_integer(row[::-1], sizes[::-1]) for row in rows.tolist()]
    assert codec.encode(rows).tolist() == expected_public
    assert codec.key(rows).tolist() == expected_keys
    assert codec.encode(torch.from_numpy(rows)).tolist() == expected_public
    assert codec.key(torch.from_numpy(rows)).tolist() == expected_keys


@given(codebooks_and_rows(), st.sampled_from(["numpy", "torch"]))
def test_decoding_undoes_encoding(case, library):
    sizes, rows = case
    codec = SemanticIdCodec(sizes)
    codes = rows if library == "numpy" else torch.from_numpy(rows)
    for back in (codec.decode(codec.encode(codes)), codec.codes_of_key(codec.key(codes))):
        assert type(back) is type(codes)
        assert back.dtype == codes.dtype
        assert back.tolist() == rows.tolist()


@given(codebooks_and_rows())
def test_key_order_is_lexicographic_order_of_codes(case):
    sizes, rows = case
    by_key = rows[np.argsort(SemanticIdCodec(sizes).key(rows), kind="stable")]
    assert by_key.tolist() == sorted(rows.tolist())


@given(codebooks_and_rows())
def test_items_below_a_prefix_are_one_range_of_keys(case):
    sizes, rows = case
    codec = SemanticIdCodec(sizes)
    for level, span in enumerate(codec.suffix_sizes):
        first, last = rows[0].copy(), rows[0].copy()
        first[level + 1 :] = 0
        last[level + 1 :] = np.array(sizes[level + 1 :]) - 1
        assert int(codec.key(last)) - int(codec.key(first)) == span - 1


@given(wide_codebooks())
def test_the_largest_semantic_id_round_trips(sizes):
    codec = SemanticIdCodec(sizes)
    top = np.array(sizes) - 1
    assert int(codec.encode(top)) == int(codec.key(top)) == codec.capacity - 1
    assert codec.decode(codec.encode(top)).tolist() == top.tolist()
    assert codec.codes_of_key(torch.tensor(codec.capacity - 1)).tolist() == top.tolist()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (0, 3)])
def test_any_leading_shape_is_kept(shape):
    codec = SemanticIdCodec((4, 5, 6))
    codes = np.ones(shape, np.int64)
    assert np.asarray(codec.encode(codes)).shape == shape[:-1]
    assert codec.decode(codec.encode(codes)).shape == shape
    assert codec.decode(codec.encode(torch.from_numpy(codes))).shape == shape


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, torch.uint8, torch.int32])
def test_narrow_integer_types_do_not_overflow(dtype):
    codec = SemanticIdCodec((512,) * 5)
    codes = torch.tensor([[7] * 5], dtype=dtype) if isinstance(dtype, torch.dtype) else np.full((1, 5), 7, dtype)
    assert codec.encode(codes).tolist() == [public_integer([7] * 5, codec.codebook_sizes)]
    small = codes[0, :1]
    assert codec.decode(small).tolist() == [[7, 0, 0, 0, 0]]


def test_lists_are_read_as_arrays():
    codec = SemanticIdCodec((4, 5))
    assert codec.key([[1, 2], [3, 4]]).tolist() == [7, 19]
    assert codec.codes_of_key([7, 19]).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("sizes", [(2**63,), (512,) * 7, (2**21,) * 3, (10**30,) * 26])
def test_more_semantic_ids_than_63_bits_are_refused(sizes):
    with pytest.raises(ValueError, match="does not fit a signed 64-bit integer; use fewer levels"):
        SemanticIdCodec(sizes)


def test_the_largest_capacity_is_accepted():
    assert SemanticIdCodec((2**63 - 1,)).capacity == 2**63 - 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "1 to 26 levels, got 0"),
        ((2,) * 27, "1 to 26 levels, got 27"),
        ((4, 0), "at least 1"),
        ((4, -2), "at least 1"),
        ((4, 2.5), "integers"),
        (["a"], "integers"),
        (7, "integers"),
    ],
)
def test_unusable_codebooks_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        SemanticIdCodec(sizes)


@given(codebooks_and_rows(), st.data())
def test_a_code_out_of_range_is_named(case, data):
    sizes, rows = case
    row = data.draw(st.integers(0, len(rows) - 1))
    level = data.draw(st.integers(0, len(sizes) - 1))
    wrong = data.draw(st.one_of(st.integers(-(2**63), -1), st.integers(sizes[level], 2**63 - 1)))
    rows[row, level] = wrong
    message = rf"code {wrong} of level {level + 1} in row {row} .* 0 to {sizes[level] - 1}$"
    for codes in (rows, torch.from_numpy(rows)):
        for convert in (SemanticIdCodec(sizes).encode, SemanticIdCodec(sizes).key):
            with pytest.raises(ValueError, match=message):
                convert(codes)


@given(wide_codebooks(), st.integers(1, 9))
def test_a_wrong_number_of_levels_is_refused(sizes, levels):
    if levels == len(sizes):
        levels += 1
    with pytest.raises(ValueError, match=f"expected {len(sizes)} codes per semantic ID, got {levels}"):
        SemanticIdCodec(sizes).encode(np.zeros((2, levels), np.int64))


@given(wide_codebooks(), st.data())
def test_an_integer_beyond_the_capacity_is_refused(sizes, data):
    codec = SemanticIdCodec(sizes)
    beyond = st.integers(codec.capacity, 2**63 - 1) if codec.capacity < 2**63 - 1 else st.nothing()
    wrong = data.draw(st.one_of(st.integers(-(2**63), -1), beyond))
    for values in (np.array([0, wrong]), torch.tensor([0, wrong])):
        for convert in (codec.decode, codec.codes_of_key):
            with pytest.raises(ValueError, match=f"outside 0 … {codec.capacity - 1}"):
                convert(values)


@pytest.mark.parametrize("codes", [np.array([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), [["1", "2"]]])
def test_codes_that_are_no_integers_are_refused(codes):
    with pytest.raises(ValueError, match="must be integers"):
        SemanticIdCodec((4, 4)).encode(codes)


def test_token_texts():
    assert [code_token(0, 12), code_token(2, 0)] == ["<a_12>", "<c_0>"]
    assert [placeholder_token(0), placeholder_token(2)] == ["<sp_1>", "<sp_3>"]
