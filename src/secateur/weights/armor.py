"""ARMOR: a sparse core between two block-diagonal matrices that make up for what went."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import CORE, Paper
from secateur.core.pattern import Pattern
from secateur.core.statistics import Statistic
from secateur.weights.base import Problem, Solution, WeightMethod, register

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.weights.armor_steps import Factors
    from secateur.weights.nowag import Normalised

__all__ = ["Armor"]

ROUNDS = {"als": 60, "adam": 2500, "gd": 2500}
"""Most iterations where none are given; most of what 20,000 steps of Adam gain comes within 2,500."""
RELATIVE, ABSOLUTE = 1e-6, 1e-8
"""What an iteration must gain not to count as idle."""


@register
class Armor(WeightMethod):
    """W = A S B with S sparse, A and B of square blocks on the diagonal (armor, section 2).

    It starts at NoWag-P and keeps the best factors it meets, so it is never behind NoWag-P in its own error:
    that of the matrix with unit columns and rows, each column weighed by its input's second moment. The
    continuous step is published as `adam`; `als` solves for A and B exactly and needs far fewer rounds.
    Statistics are those of the pruned blocks before, like all methods' here; published are the dense ones.
    """

    id: ClassVar[str] = "armor"
    paper: ClassVar[Paper | None] = Paper(
        "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization",
        2025,
        "2510.05528",
    )
    removes: ClassVar[str] = CORE
    effect: ClassVar[str] = "a product written out as a dense matrix: not smaller and not faster"
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    default_pattern: ClassVar[Pattern] = Pattern("matrix")
    leaves_zeros: ClassVar[bool] = False

    block: int = Field(128, ge=1, description="largest size of the blocks of A and B; it divides the matrix")
    overhead: float = Field(
        0.3,
        gt=0,
        description="most numbers in A and B, of those of the matrix; blocks shrink towards it",
    )
    continuous: Literal["als", "adam", "gd"] = Field("als", description="how A, B and the values of S move")
    iterations: int | None = Field(None, ge=1, description="most rounds; empty: 60 of als, else 2500")
    rate: float = Field(1e-4, gt=0, description="learning rate of adam")
    core_steps: int = Field(8, ge=0, description="groups of S in each block that are chosen anew a round")
    select: Literal["gradient", "greedy", "random"] = Field(
        "gradient", description="the group: drawn by its gradient, the largest gradient, or any"
    )
    store: Literal["dense", "factors"] = Field(
        "dense", description="what is written: the product as an ordinary matrix, or A, S and B"
    )
    patience: int = Field(100, ge=1, description="idle rounds in a row after which it ends")

    @property
    def stores_factors(self) -> bool:
        return self.store == "factors"

    def score(self, problem: Problem) -> Tensor:
        """That of NoWag-P, which chooses the first support."""
        from secateur.weights.nowag import normalise

        return normalise(problem.weight, problem.inputs).importance()

    def prune(self, problem: Problem) -> Solution:
        """The product A S B in the scale of the weights; `kept` is the support of S."""
        import torch

        from secateur.core.numerics import exact_products
        from secateur.core.selection import select
        from secateur.weights.armor_steps import Factors, block_sizes
        from secateur.weights.nowag import normalise

        whole = normalise(problem.weight, problem.inputs)
        kept = select(whole.importance(), problem.pattern, problem.sparsity, name=problem.name)
        if bool(kept.all()):
            return Solution(problem.weight.clone(), kept)
        rows, columns = kept.shape
        group = problem.pattern.of if problem.pattern.kind == "n:m" else 1
        a, b = block_sizes((rows, columns), group, self.block, self.overhead)
        with exact_products(), torch.no_grad():
            start = Factors.start(whole.matrix, kept, a, b)
            first = start.loss(whole)
            best, last, rounds = self._improve(start, whole, problem, first)
            factored = best.folded(whole)
            weight = factored.product()
        notes = {"block_rows": a, "block_columns": b, "extra": (a * rows + b * columns) / kept.numel()}
        notes |= {"proxy_first": first, "proxy_last": last, "iterations": rounds}
        return Solution(
            weight,
            best.kept,
            {name: float(note) for name, note in notes.items()},
            factored=factored if self.stores_factors else None,
        )

    def _improve(
        self, factors: Factors, whole: Normalised, problem: Problem, loss: float
    ) -> tuple[Factors, float, int]:
        """The best factors on the way, their loss, and the rounds it took (armor, section 2.5)."""
        from secateur.weights.armor_core import CoreStep
        from secateur.weights.armor_steps import STEPS

        step = STEPS[self.continuous](self.rate)
        core = CoreStep(problem.pattern, self.select, problem.generator)
        best, least, idle, rounds = factors.copy(), loss, 0, 0
        while rounds < (self.iterations or ROUNDS[self.continuous]) and idle < self.patience:
            rounds += 1
            step(factors, whole)
            core(factors, whole, self.core_steps)
            before, loss = loss, factors.loss(whole)
            if loss < least:
                best, least = factors.copy(), loss
            idle = 0 if before - loss > max(RELATIVE * before, ABSOLUTE) else idle + 1
        return best, least, rounds
