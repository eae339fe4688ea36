"""Matrices of few bits in place of one tensor: each comes back to the bit, and damage is seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantise.problems import draw
from secateur.quantise.gptq import round_to_nearest
from secateur.quantise.low_bit import parts_of
from secateur.quantise.low_bit_stack import join, split, stack_of, wrong_with_stack


def made(
    bits: list[int], rows: int, columns: int, group: int, transposed: bool
) -> tuple[dict[str, Tensor], tuple[int, ...], list[Tensor]]:
    """Parts of a stack, the shape of its tensor, and the matrices that went in."""
    rounded = [
        round_to_nearest(draw((rows, columns), seed), own, group=group, steps=0)
        for seed, own in enumerate(bits)
    ]
    parts = join([parts_of(one) for one in rounded], transposed=transposed)
    plane = (columns, rows) if transposed else (rows, columns)
    return parts, (len(bits), *plane), [one.weight for one in rounded]


@settings(max_examples=30, deadline=None)
@given(
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    rows=st.integers(1, 7),
    columns=st.integers(1, 40),
    group=st.integers(1, 50),
    transposed=st.booleans(),
)
def test_every_matrix_comes_back(
    bits: list[int], rows: int, columns: int, group: int, transposed: bool
) -> None:
    parts, shape, weights = made(bits, rows, columns, group, transposed)
    assert wrong_with_stack(parts, shape) == ""
    dense = stack_of(parts, shape)
    assert dense.shape == shape
    assert dense.is_contiguous(), "or products differ in their last digit from those of a dense file"
    assert (dense.mT if transposed else dense).equal(torch.stack(weights))
    alone = [
        parts_of(round_to_nearest(weight, own, group=group, steps=0))
        for weight, own in zip(weights, bits, strict=True)
    ]
    for one, other in zip(split(parts, shape), alone, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].shape == other[name].shape for name in other)


def test_one_bit_stores_no_low_and_a_matrix_alone_needs_no_stack_axis() -> None:
    parts, _, _ = made([1, 1], 4, 32, 16, True)
    assert parts["low"].numel() == 0
    single, (_, *plane), weights = made([3], 4, 32, 16, True)
    assert wrong_with_stack(single, plane) == ""
    assert stack_of(single, plane).equal(weights[0].T)


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("layout", torch.tensor([[2, 16]], dtype=torch.int32), "layout"),
        ("layout", torch.tensor([[2, 16], [9, 16]], dtype=torch.int32), "9"),
        ("layout", torch.tensor([[2, 16], [2, 16]], dtype=torch.int32), "codes"),
        ("layout", torch.tensor([[3, 16], [2, 16]], dtype=torch.int32), ""),
        ("transposed", torch.tensor([2], dtype=torch.int32), "transposed"),
        ("transposed", torch.tensor([1], dtype=torch.int32), "codes"),
        ("codes", torch.zeros(3, dtype=torch.uint8), "codes"),
        ("scale", torch.zeros(16), "float32"),
        ("scale", torch.full((16,), torch.inf, dtype=torch.float16), "finite"),
        ("low", torch.zeros(15, dtype=torch.float16), "low"),
    ],
)
def test_damage_is_seen(part: str, value: Tensor, word: str) -> None:
    parts, shape, _ = made([2, 3], 4, 24, 16, False)
    assert word in wrong_with_stack({**parts, part: value}, shape)
    assert bool(word) == bool(wrong_with_stack({**parts, part: value}, shape))
