"""Codes come back as they were, and leave no gaps."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.quantise.codes import pack_codes, row_bytes, unpack_codes


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 75), st.integers(0, 1000))
def test_packed_and_back(bits: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, 3, columns), generator=generator, dtype=torch.uint8)
    stream = pack_codes(codes, bits)
    assert stream.dtype == torch.uint8
    assert stream.shape == (2, 3, row_bytes(columns, bits))
    assert row_bytes(columns, bits) == (columns * bits + 7) // 8
    assert unpack_codes(stream, bits, columns).equal(codes)


def test_the_stream_is_little_endian() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    whole = sum(int(code) << (3 * place) for place, code in enumerate(codes[0]))
    assert pack_codes(codes, 3)[0].tolist() == list(whole.to_bytes(3, "little"))
