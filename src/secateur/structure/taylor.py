"""What the loss feels of a unit, gathered over its matrices (llm-pruner, sections 2.2 and 2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from secateur.core.method import Method
from secateur.core.statistics import Statistic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TaylorScore"]

TERMS: Mapping[str, Statistic] = {
    "vector": "taylor_vector",
    "first": "taylor_first",
    "second": "taylor_second",
    "mixed": "taylor_mixed",
}


class TaylorScore(Method):
    """Part of the methods that rank units by Taylor expansion of the loss."""

    needs: ClassVar[frozenset[Statistic]] = frozenset({"taylor_first"})

    order: Literal["first", "second", "mixed", "vector"] = Field(
        "first",
        description="first: sum of |w g|; second: of w A w, A the mean of g^2; mixed: of |w g - w A w / 2|; "
        "vector: |sum of w g|",
    )
    per_sample: bool = Field(
        False, description="order first of every sequence, then the mean: does not fade with many sequences"
    )
    aggregation: Literal["sum", "mean", "max", "prod", "root"] = Field(
        "sum",
        description="over the matrices of a unit; prod is the geometric mean, root the first matrix alone "
        "(gate_proj, k_proj)",
    )

    @field_validator("per_sample")
    @classmethod
    def _only_first(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("order", "first") != "first":
            raise ValueError("only order=first differs between the mean gradient and single sequences")
        return value

    @property
    def statistics(self) -> frozenset[Statistic]:
        term: Statistic = "taylor_sample" if self.per_sample else TERMS[self.order]
        return (super().statistics - {"taylor_first"}) | {term}

    def rank(self, taylor: Mapping[Statistic, Tensor]) -> Tensor:
        """(count,) float64 from (members, count); see `UnitProblem.taylor`."""
        (term,) = self.statistics & taylor.keys()
        members = taylor[term].abs()
        if self.aggregation == "root":
            return members[0]
        if self.aggregation == "prod":
            return members.log().mean(0).exp()  # as a product it would underflow
        return {"sum": members.sum(0), "mean": members.mean(0), "max": members.amax(0)}[self.aggregation]
