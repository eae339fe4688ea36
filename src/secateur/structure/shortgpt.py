"""ShortGPT: blocks that hardly turn the residual stream can go."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from secateur.core.method import Paper
from secateur.structure.base import BlockStates, DepthMethod, register

__all__ = ["ShortGpt"]


@register
class ShortGpt(DepthMethod):
    """Removes the blocks of lowest influence, or the run of blocks across which the last token turns least
    (structured-baselines, section 2.3)."""

    id: ClassVar[str] = "shortgpt"
    paper: ClassVar[Paper | None] = Paper(
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, "2403.03853"
    )

    metric: Literal["influence", "angular"] = Field(
        "influence",
        description="influence: blocks one by one; angular: consecutive blocks (arXiv 2403.17887)",
    )

    def choose(self, states: BlockStates, count: int) -> list[int]:
        if self.metric == "influence":
            return sorted(states.influence.argsort(stable=True)[:count].tolist())
        start = int(states.angles.diagonal(count).argmin())
        return list(range(start, start + count))
