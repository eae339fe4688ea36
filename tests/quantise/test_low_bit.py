"""What is stored is what was rounded, to the bit, and damage is seen."""

from __future__ import annotations

import pytest
import torch

from quantise.problems import draw, observed
from secateur.quantise.gptq import gptq, round_to_nearest
from secateur.quantise.grid import bits_a_weight
from secateur.quantise.low_bit import parts_of, quantised_of, wrong_with

SHAPES = [(4, 256), (3, 200), (5, 7), (1, 129), (6, 40)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_comes_back_is_what_was_rounded_to_the_bit(bits: int, shape: tuple[int, int]) -> None:
    weight, inputs = draw(shape, bits), observed(shape[1], 2 * shape[1] + 10, 1)
    for found in (round_to_nearest(weight, bits), gptq(weight, inputs, bits, steps=5)):
        parts = parts_of(found)
        assert wrong_with(parts, *shape) == ""
        back = quantised_of(parts, shape[1])
        assert back.weight.equal(found.weight)
        assert back.codes.equal(found.codes)
        assert back.grid.low.equal(found.grid.low)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rounding_what_was_rounded_changes_nothing(bits: int) -> None:
    found = round_to_nearest(draw((4, 200), 3), bits)
    assert found.grid.codes(found.weight).equal(found.codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_it_takes_the_bits_that_are_said(bits: int, shape: tuple[int, int]) -> None:
    parts = parts_of(round_to_nearest(draw(shape, 0), bits))
    said = bits_a_weight(bits, 128, shape[1]) * shape[0] * shape[1]
    assert sum(8 * part.nbytes for part in parts.values()) == pytest.approx(said + 64)  # and the layout


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("low", None, "missing"),
        ("codes", torch.zeros(4, 3, dtype=torch.uint8), "codes"),
        ("codes", torch.zeros(4, 50), "codes"),
        ("scale", torch.zeros(4, 3, dtype=torch.float16), "scale"),
        ("scale", torch.full((4, 2), torch.inf, dtype=torch.float16), "finite"),
        ("low", torch.zeros(3, 2, dtype=torch.float16), "low"),
        ("layout", torch.tensor([9, 128], dtype=torch.int32), "9 bits"),
        ("layout", torch.tensor([2, 0], dtype=torch.int32), "groups of 0"),
        ("layout", torch.tensor([2], dtype=torch.int32), "layout"),
    ],
)
def test_damage_is_seen(part: str, value: torch.Tensor | None, word: str) -> None:
    parts = parts_of(round_to_nearest(draw((4, 200), 0), 2))
    parts = {name: one for name, one in parts.items() if name != part}
    if value is not None:
        parts[part] = value
    assert word in wrong_with(parts, 4, 200)
