"""LLM-Pruner: remove the coupled structures that the loss feels least."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.structure.base import StructureMethod, UnitProblem, register
from secateur.structure.taylor import TaylorScore

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LlmPruner"]


@register
class LlmPruner(TaylorScore, StructureMethod):
    """Taylor expansion of the loss over all matrices of a head or channel, first and last blocks left whole
    (llm-pruner, sections 2.1 to 2.4).

    A query head counts for the key-value head it reads, number q // g; the published code credits q mod K.
    """

    id: ClassVar[str] = "llm-pruner"
    paper: ClassVar[Paper | None] = Paper(
        "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, "2305.11627"
    )
    comparable: ClassVar[bool] = True

    protect_first: float = Field(
        0.125, ge=0, le=1, description="share of the blocks, from the first, left whole"
    )
    protect_last: float = Field(
        0.0625, ge=0, le=1, description="share of the blocks, from the last, left whole"
    )
    per_parameter: bool = Field(
        True, description="importance for each parameter that goes: what the spread global compares"
    )

    def score(self, problem: UnitProblem) -> Tensor:
        scores = self.rank(problem.taylor)
        return scores / problem.units.parameters if self.per_parameter else scores
