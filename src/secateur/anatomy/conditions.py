"""Conditions of family files: `index >= first_k_dense_replace`, `not add_cross_attention`.

Names are values of any kind; a name alone holds when its value counts as true in Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from secateur.anatomy.axes import parse_expression
from secateur.anatomy.config import Lookup
from secateur.core.errors import AnatomyError

__all__ = ["holds"]

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda member, group: member in group,
    ast.NotIn: lambda member, group: member not in group,
}


def holds(condition: str, lookup: Lookup) -> bool:
    """Whether a condition is true.

    Raises:
        AnatomyError: other syntax, or values that it cannot be asked of.
    """
    try:
        return bool(_value(parse_expression(condition), lookup))
    except (TypeError, ZeroDivisionError) as error:
        raise AnatomyError(f"condition {condition!r} cannot be answered ({error})") from error


def _value(node: ast.expr, lookup: Lookup) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return lookup(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, lookup)
    if isinstance(node, ast.BoolOp):
        combine = all if isinstance(node.op, ast.And) else any
        return combine(_value(part, lookup) for part in node.values)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, lookup), _value(node.right, lookup))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        other = _value(node.comparators[0], lookup)
        return _OPERATORS[type(node.ops[0])](_value(node.left, lookup), other)
    raise AnatomyError(
        f"condition {ast.unparse(node)!r}", "names, numbers, '+', '%', comparisons, and, or, not"
    )
