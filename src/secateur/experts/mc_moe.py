"""MC-MoE: one, two or three bits for each expert, by an integer programme over what its rounding costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.errors import RecipeError
from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.experts.base import register
from secateur.experts.precision import PrecisionMethod, Rounding

if TYPE_CHECKING:
    from secateur.core.allotment import Frontier

__all__ = ["McMoe"]

LEVELS = (1, 2, 3)


@register
class McMoe(PrecisionMethod):
    """Pre-loading mixed-precision quantisation (mc-moe, sections 2.1 to 2.4).

    An expert costs phi^alpha * w^beta * eps^gamma at each number of bits: how often it is visited, how much
    it weighs, and how far its rounding moves the output of the block. The cheapest choice of the budget is
    exact. An expert that no token visited costs nothing, takes one bit and is rounded to the nearest.
    """

    id: ClassVar[str] = "mc-moe"
    paper: ClassVar[Paper | None] = Paper(
        "Mixture Compressor for Mixture-of-Experts LLMs Gains More", 2024, "2410.06270"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"routing"})

    bits: float = Field(
        2.5, ge=1, le=3, description="of a weight of the experts on average, without scales; rounded down"
    )
    scope: Literal["block", "global"] = Field(
        "block", description="the same average in every block, or one budget for the whole model"
    )
    budget: Literal["at_most", "equal"] = Field(
        "at_most", description="bits is a limit (never worse), or is spent to the last"
    )
    alpha: float = Field(1, ge=0, description="exponent of the share of tokens")
    beta: float = Field(1, ge=0, description="exponent of the share of router probability (code: 1.5)")
    gamma: float = Field(2, ge=0, description="exponent of the rounding error (code: that of alpha)")
    two_bits: int = Field(1, ge=0, description="experts of a block that get two bits at least")
    three_bits: int = Field(1, ge=0, description="experts of a block that get three bits at least")

    @property
    def average_bits(self) -> float:
        return self.bits

    @property
    def levels(self) -> tuple[int, ...]:
        return LEVELS

    def allot(self, blocks: Sequence[Rounding]) -> list[list[int]]:
        from secateur.core.allotment import InfeasibleError, allot_groups

        together = (
            [range(len(blocks))] if self.scope == "global" else [range(i, i + 1) for i in range(len(blocks))]
        )
        frontiers = [self._frontier(block) for block in blocks]
        found: list[list[int]] = []
        for part in together:
            count = sum(blocks[place].count for place in part)
            budget = int(self.bits * count + 1e-9)
            try:
                levels = allot_groups(
                    [frontiers[place] for place in part], budget, exactly=self.budget == "equal"
                )
            except InfeasibleError as error:
                raise self._refusal(blocks[part[0]], count, budget, error.least, error.most) from error
            found += [[LEVELS[level] for level in own] for own in levels]
        return found

    def _frontier(self, block: Rounding) -> Frontier:
        """The cheapest choices of a block for all budgets; all cost nothing before anything is observed."""
        import numpy as np

        from secateur.core.allotment import frontier
        from secateur.quantise.experts import rounding_losses

        floors = {1: self.two_bits, 2: self.three_bits}
        if sum(floors.values()) > block.count:
            raise RecipeError(
                f"two_bits={self.two_bits} and three_bits={self.three_bits}",
                f"together no more than the {block.count} experts of block {block.block}",
                "lower them",
            )
        losses = np.zeros((block.count, len(LEVELS)))
        if block.visits is not None and block.probabilities is not None and block.errors is not None:
            exponents = self.alpha, self.beta, self.gamma
            losses = rounding_losses(block.visits, block.probabilities, block.errors, *exponents).numpy()
        return frontier(losses, np.array(LEVELS), floors)

    def _refusal(self, block: Rounding, count: int, budget: int, least: int, most: int) -> RecipeError:
        where = f"the {count} experts of block {block.block}" if self.scope == "block" else f"{count} experts"
        floors = f"two_bits={self.two_bits}, three_bits={self.three_bits}"
        return RecipeError(
            f"bits={self.bits:g}, which is {budget} for {where}",
            f"{least} to {most} ({least / count:.3g} to {most / count:.3g} each) with {floors}",
            "raise bits, or lower two_bits and three_bits" if budget < least else "lower bits",
        )
