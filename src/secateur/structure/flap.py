"""FLAP: what hardly fluctuates can be replaced by its mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.core.statistics import InputStatistics, Statistic
from secateur.structure.base import Compensation, Spread, StructureMethod, UnitProblem, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Flap"]

SMALLEST = 1e-30


@register
class Flap(StructureMethod):
    """Fluctuation of a channel times the weights that read it; the mean of what goes becomes a bias
    (flap, sections 2.1 to 2.4).

    Few channels fluctuate much, so the mean of z-scores over a head is close to zero where channels reach far
    up: `rank` has two other ways for heads and channels to compete (flap, section 5).
    """

    id: ClassVar[str] = "flap"
    paper: ClassVar[Paper | None] = Paper(
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023, "2312.11983"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"second_moment", "mean"})

    comparable: ClassVar[bool] = True

    spread: Spread = Field(
        "global",
        description="global: AL-AM of the paper, with remove_heads AL-MM; uniform: UL-UM and UL-MM; also "
        "sigmoid, knapsack",
    )
    metric: Literal["wifv", "wifn", "ifv"] = Field(
        "wifv", description="variance times squared weights, mean weight times norm, or variance alone"
    )
    rank: Literal["zscore", "log", "loss"] = Field(
        "zscore", description="what blocks compete by: standard deviations, logarithms, or loss a parameter"
    )
    attention_power: float = Field(
        1.0, gt=0, description="power of the channel metric of attention; the published code uses 2"
    )
    compensate: Compensation = Field(
        "bias", description="none, bias (mean output) or least_squares (refit on what stays)"
    )

    def score(self, problem: UnitProblem) -> Tensor:
        columns = self._channels(problem)
        if not problem.units.kind.endswith("ffn"):
            columns = columns**self.attention_power
        units = problem.units
        if self.rank == "loss":
            return units.per_unit(columns).sum(1) / units.parameters
        if self.rank == "log":
            return units.per_unit(columns).mean(1).clamp_min(SMALLEST).log()
        return units.per_unit(_standardised(columns)).mean(1)

    def _channels(self, problem: UnitProblem) -> Tensor:
        """(C,) importance of the columns, float64."""
        weight, inputs = problem.weight.double(), problem.inputs
        if self.metric == "wifn":
            assert inputs.second_moment is not None
            return weight.abs().mean(0) * (inputs.second_moment / max(inputs.tokens, 1)).sqrt()
        variance = _variance(inputs)
        return variance if self.metric == "ifv" else variance * weight.square().sum(0)


def _mean(inputs: InputStatistics) -> Tensor:
    assert inputs.mean is not None
    return inputs.mean / max(inputs.tokens, 1)


def _variance(inputs: InputStatistics) -> Tensor:
    """(C,) unbiased variance over tokens, from sums in float64."""
    assert inputs.second_moment is not None
    excess = inputs.second_moment - inputs.tokens * _mean(inputs).square()
    return excess.clamp_min(0) / max(inputs.tokens - 1, 1)


def _standardised(columns: Tensor) -> Tensor:
    deviation = columns.std()
    return (columns - columns.mean()) / deviation if float(deviation) > 0 else columns * 0
