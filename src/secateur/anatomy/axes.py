"""The small language of family files: sizes from config keys, axes from sizes.

A size is arithmetic (`+`, `*`, `//`, whole numbers) over names: `hidden_size // num_attention_heads`.
An axis is a sum of segments; a segment is a product whose first factor, if it is a space, is what can be
sliced: `heads*head_dim + kv_heads*head_dim` is heads of head_dim rows, then kv_heads of head_dim rows.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod

from secateur.anatomy.model import Axis, Segment
from secateur.core.errors import AnatomyError

__all__ = ["evaluate", "parse_axis", "parse_expression"]

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: str, lookup: Callable[[str], int | None]) -> int | None:
    """The value of a size, or `None` when a name in it has none. Raises `AnatomyError` on other syntax."""
    return _value(parse_expression(expression), lookup)


def parse_axis(expression: str, spaces: Mapping[str, int], sizes: Mapping[str, int]) -> Axis:
    """The segments of an axis. Raises `AnatomyError` for a name that is in neither mapping."""
    return Axis(
        tuple(_segment(term, spaces, sizes) for term in _flatten(parse_expression(expression), ast.Add))
    )


@lru_cache(maxsize=1024)
def parse_expression(expression: str) -> ast.expr:
    """The syntax tree of an expression. Raises `AnatomyError` when there is none."""
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise AnatomyError(f"expression {expression!r}", "names, numbers and operators") from error


def _value(node: ast.expr, lookup: Callable[[str], int | None]) -> int | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return lookup(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, lookup), _value(node.right, lookup)
        return None if left is None or right is None else _OPERATORS[type(node.op)](left, right)
    raise AnatomyError(f"size {ast.unparse(node)!r}", "names, numbers, '+', '*' and '//'")


def _flatten(node: ast.expr, kind: type[ast.operator]) -> list[ast.expr]:
    """The operands of a chain of one operator, left to right."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, kind):
        return [*_flatten(node.left, kind), *_flatten(node.right, kind)]
    return [node]


def _segment(term: ast.expr, spaces: Mapping[str, int], sizes: Mapping[str, int]) -> Segment:
    def known(name: str) -> int:
        value = spaces.get(name, sizes.get(name))
        if value is None:
            raise AnatomyError(f"size {name!r} in {ast.unparse(term)!r}", "a name that the config gives")
        return value

    first, *rest = _flatten(term, ast.Mult)
    unit = prod(_value(factor, known) or 0 for factor in rest)
    if isinstance(first, ast.Name) and first.id in spaces:
        inner = rest[-1].id if rest and isinstance(rest[-1], ast.Name) else None
        return Segment(first.id, spaces[first.id], unit, inner)
    return Segment(None, (_value(first, known) or 0) * unit, 1)
