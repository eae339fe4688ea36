"""CFSP: how much a block turns the hidden state says how many channels it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.structure.base import Spread, StructureMethod, Targets, UnitProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cfsp"]


@register
class Cfsp(StructureMethod):
    """Coarse: the spread `sigmoid` over the angle between a block's input and output. Fine: activation norms,
    alone or times relative weights, inside a block (cfsp, sections 2.1 to 2.3).

    The default modes of the published code reduce to the activation norm alone, since each of its terms is
    normalised along the axis it is averaged over; `fine=relative` normalises along the other one.
    """

    id: ClassVar[str] = "cfsp"
    paper: ClassVar[Paper | None] = Paper(
        "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information",
        2024,
        "2409.13199",
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})

    spread: Spread = Field("sigmoid", description="sigmoid (the method), uniform, global or knapsack")
    targets: Targets = Field("ffn", description="ffn (the method), heads or all")
    fine: Literal["relative", "activation", "wanda"] = Field(
        "relative", description="relative weights times norms, norms alone, or weights times norms"
    )

    def score(self, problem: UnitProblem) -> Tensor:
        norms = problem.inputs.input_norms().double()
        per_unit = problem.units.per_unit
        if self.fine == "activation":
            return per_unit(norms).mean(1)
        read = problem.weight.abs().double() * norms
        if self.fine == "wanda":
            return per_unit(read.mean(0)).sum(1)
        share = per_unit(_share(read).sum(0)).sum(1)
        made = [
            _share(part.abs().double().T).sum(0).view(len(share), -1).sum(1) for part in problem.producers
        ]
        return (share + sum(made)) * per_unit(norms).mean(1)


def _share(columns: Tensor) -> Tensor:
    """How much of each row comes through each column."""
    return columns / columns.sum(1, keepdim=True).clamp_min(1e-30)
