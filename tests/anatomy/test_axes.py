"""The language of family files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.anatomy.axes import evaluate, parse_axis
from secateur.anatomy.model import Axis, Segment
from secateur.core.errors import AnatomyError

SPACES = {"heads": 8, "kv_heads": 2, "ffn": 96, "head_dim": 16}
SIZES = {"rope": 4, "value": 12}


def test_fused_axis_keeps_its_parts_apart() -> None:
    axis = parse_axis("heads*head_dim + kv_heads*head_dim + kv_heads*head_dim", SPACES, SIZES)
    heads, keys = Segment("heads", 8, 16), Segment("kv_heads", 2, 16)
    assert axis == Axis((heads, keys, keys))
    assert axis.size == 8 * 16 + 2 * 2 * 16


@pytest.mark.parametrize(
    ("expression", "segment"),
    [
        ("ffn", Segment("ffn", 96, 1)),
        ("ffn*2", Segment("ffn", 96, 2)),
        ("heads*3*head_dim", Segment("heads", 8, 48)),
        ("heads*(rope + value)", Segment("heads", 8, 16)),
        ("rope", Segment(None, 4, 1)),
        ("1", Segment(None, 1, 1)),
        ("3*rope", Segment(None, 12, 1)),
    ],
)
def test_first_factor_is_what_can_be_sliced(expression: str, segment: Segment) -> None:
    assert parse_axis(expression, SPACES, SIZES) == Axis((segment,))


@given(st.integers(1, 999), st.integers(1, 999), st.integers(1, 999))
def test_sizes_are_whole_number_arithmetic(a: int, b: int, c: int) -> None:
    assert evaluate("a + b * c // 7", {"a": a, "b": b, "c": c}.get) == a + b * c // 7


def test_size_without_its_key_is_unknown_rather_than_wrong() -> None:
    assert evaluate("4 * missing", {"other": 3}.get) is None


def test_axis_of_unknown_size_names_it() -> None:
    with pytest.raises(AnatomyError, match="'q_rank'"):
        parse_axis("heads*head_dim + q_rank", SPACES, SIZES)


@pytest.mark.parametrize("expression", ["heads - 1", "heads.real", "__import__('os')", "heads *", "1.5"])
def test_nothing_but_arithmetic_is_read(expression: str) -> None:
    with pytest.raises(AnatomyError):
        evaluate(expression, SPACES.get)
