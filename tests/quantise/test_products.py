"""Products from bytes are those with the weights that the bytes stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantise.problems import draw
from secateur.quantise import products
from secateur.quantise.gptq import round_to_nearest
from secateur.quantise.low_bit import parts_of
from secateur.quantise.products import byte_products, in_bytes


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    group=st.integers(1, 80),
    tokens=st.integers(1, 3),
    piece=st.sampled_from([1, 64, 1 << 18]),
)
def test_they_are_those_of_the_weights(
    bits: int, rows: int, columns: int, group: int, tokens: int, piece: int
) -> None:
    found = round_to_nearest(draw((rows, columns), bits), bits, group=group, steps=0)
    parts, inputs = parts_of(found), draw((tokens, columns), 100)
    if not in_bytes(parts):
        assert group * bits % 8
        assert group < columns
        return
    expected = inputs.double() @ found.weight.double().T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "PIECE", piece)
        given_back = byte_products(parts, inputs)
    assert given_back.dtype == torch.float32
    torch.testing.assert_close(given_back.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_usual_groups_lie_in_whole_bytes(bits: int) -> None:
    for columns in (128, 256, 300):
        assert in_bytes(parts_of(round_to_nearest(draw((2, columns), 0), bits, group=128, steps=0)))
