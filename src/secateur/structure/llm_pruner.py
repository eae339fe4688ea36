"""LLM-Pruner: remove the coupled structures that the loss feels least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from secateur.core.method import Method, Paper
from secateur.core.statistics import Statistic
from secateur.structure.base import (
    BlockStates,
    DepthMethod,
    StructureMethod,
    UnitProblem,
    WidthMethod,
    register,
)
from secateur.structure.taylor import TaylorScore

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LlmPruner", "LlmPrunerChannels", "LlmPrunerLayers"]


class _Shared(TaylorScore):
    """What all modes have."""

    id: ClassVar[str] = "llm-pruner"
    paper: ClassVar[Paper | None] = Paper(
        "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, "2305.11627"
    )

    mode: Literal["block", "channel", "layer"] = Field(
        "block",
        description="block: heads and feed-forward channels; channel: hidden dimensions of the whole model; "
        "layer: whole blocks",
    )
    steps: int = Field(
        1, ge=1, description="remove a part, score what is left, remove the next: so many times"
    )
    step_windows: int = Field(
        0, ge=0, description="calibration windows that a step looks at, the next ones in turn; 0: all"
    )

    @property
    def looks(self) -> int:
        return self.steps

    @property
    def windows_a_look(self) -> int:
        return self.step_windows


class LlmPrunerChannels(_Shared, WidthMethod):
    """Taylor expansion of the loss over everything that reads or writes a hidden dimension: embedding, norms,
    all matrices of all blocks, head (llm-pruner, section 2.1)."""

    removes: ClassVar[str] = "hidden dimensions, the same in the whole model"

    round_to: int = Field(8, ge=1, description="the hidden size stays a multiple of this")

    @property
    def widths(self) -> list[str]:
        return ["hidden"]

    @property
    def multiples(self) -> dict[str, int]:
        return {"hidden": self.round_to}


class LlmPrunerLayers(_Shared, DepthMethod):
    """Taylor expansion of the loss over all weights of a block. The published code keeps the first blocks
    whatever they do (llm-pruner, section 2.1)."""

    keep: Literal["important", "first"] = Field(
        "important",
        description="important: the blocks that the loss feels most; first: as the published code",
    )

    @field_validator("keep")
    @classmethod
    def _or_steps(cls, value: str, info: ValidationInfo) -> str:
        if value == "first" and info.data.get("steps", 1) > 1:
            raise ValueError("important with steps: the first blocks are not scored")
        return value

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset() if self.keep == "first" else super().statistics

    def choose(self, states: BlockStates, count: int) -> list[int]:
        blocks = len(states.influence)
        return list(range(blocks - count, blocks))


@register
class LlmPruner(_Shared, StructureMethod):
    """Taylor expansion of the loss over all matrices of a head or channel, first and last blocks left whole
    (llm-pruner, sections 2.1 to 2.4).

    A query head counts for the key-value head it reads, number q // g; the published code credits q mod K.
    """

    comparable: ClassVar[bool] = True
    modes: ClassVar[Mapping[str, type[Method]]] = {"channel": LlmPrunerChannels, "layer": LlmPrunerLayers}

    protect_first: float = Field(
        0.125, ge=0, le=1, description="share of the blocks, from the first, left whole"
    )
    protect_last: float = Field(
        0.0625, ge=0, le=1, description="share of the blocks, from the last, left whole"
    )
    per_parameter: bool = Field(
        True, description="importance for each parameter that goes: what the spread global compares"
    )

    @field_validator("steps")
    @classmethod
    def _or_a_number_of_heads(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("remove_heads") is not None:
            raise ValueError("1 with remove_heads, which go at once")
        return value

    def score(self, problem: UnitProblem) -> Tensor:
        scores = self.rank(problem.taylor)
        return scores / problem.units.parameters if self.per_parameter else scores
