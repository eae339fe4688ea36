"""A weight-pruning method: a score, a selection, and sometimes an update of what stays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.core.method import Method
from secateur.core.pattern import Pattern
from secateur.core.registry import Registry
from secateur.core.selection import select
from secateur.core.statistics import InputStatistics

__all__ = ["METHODS", "Problem", "Solution", "WeightMethod", "register"]

METHODS: Registry[type[WeightMethod]] = Registry(
    "method",
    "secateur.methods",
    {
        name: f"secateur.weights.{name}"
        for name in ("random", "magnitude", "wanda", "ria", "sparsegpt", "alps", "dsnot", "gblm")
    },
)


@dataclass
class Problem:
    """One matrix to prune.

    Attributes:
        name: for messages and the report, such as `3.self_attn.q_proj`.
        weight: (out, in) float32; a method does not change it in place.
        inputs: what was observed of its input.
        pattern: resolved comparison group (`row`, `matrix` or `n:m`).
        sparsity: fraction to remove.
        gradient: (out, in) float32 accumulated gradient magnitude, where the method asked for it.
        generator: seeded for this very matrix, independent of the order of work.
    """

    name: str
    weight: Tensor
    inputs: InputStatistics
    pattern: Pattern
    sparsity: float
    gradient: Tensor | None = None
    generator: torch.Generator | None = None


@dataclass
class Solution:
    """What a method made of a matrix.

    Attributes:
        weight: (out, in) float32 with zeros where `kept` is False.
        kept: (out, in) bool.
        notes: numbers worth reporting (iterations, losses).
        fallbacks: what had to be done differently than asked, one plain phrase each.
    """

    weight: Tensor
    kept: Tensor
    notes: dict[str, float] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)


class WeightMethod(Method):
    """Base of the methods that set single weights to zero.

    Most methods are one `score`. Those that also move the remaining weights override `prune`.
    """

    family: ClassVar[str] = "weights"
    removes: ClassVar[str] = "single weights"
    effect: ClassVar[str] = "unstructured zeros in a dense file: not smaller and not faster by themselves"
    default_pattern: ClassVar[Pattern] = Pattern("row")

    def score(self, problem: Problem) -> Tensor:
        """(out, in) importance of each weight; the smallest go."""
        raise TypeError(f"{type(self).__name__} prunes without a score of single weights")

    def prune(self, problem: Problem) -> Solution:
        """Drop the smallest scores of each comparison group."""
        kept = select(self.score(problem), problem.pattern, problem.sparsity)
        return Solution(problem.weight * kept, kept)


def register(method: type[WeightMethod]) -> type[WeightMethod]:
    """Class decorator: put a method into the catalogue under its `id`."""
    METHODS.register(method.id)(method)
    return method
