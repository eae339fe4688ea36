"""Minitron: the least active channels, heads and hidden dimensions, the same number of them everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from secateur.core.method import Paper
from secateur.core.statistics import InputStatistics, Statistic
from secateur.structure.base import WidthMethod, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Minitron"]

WIDTHS = ("hidden", "heads", "ffn")


@register
class Minitron(WidthMethod):
    """Mean over each sequence of |activation|, root of the sum of squares over sequences
    (structured-baselines, section 2.6).

    The paper trains what comes out on billions of tokens; without that, hidden dimensions are the dearest to
    lose. Its layer pruning is the method `shortgpt`, before or after.
    """

    id: ClassVar[str] = "minitron"
    paper: ClassVar[Paper | None] = Paper(
        "Compact Language Models via Pruning and Knowledge Distillation", 2024, "2407.14679"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"activity"})

    width: str = Field("hidden,heads,ffn", description="what shrinks: some of hidden, heads, ffn")
    round_hidden: int = Field(
        8, ge=1, description="the hidden size stays a multiple of this; the paper uses 256"
    )
    round_ffn: int = Field(
        8, ge=1, description="feed-forward widths stay multiples of this; the paper uses 512"
    )

    @field_validator("width")
    @classmethod
    def _known(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if not names or any(name not in WIDTHS for name in names):
            raise ValueError(f"some of {', '.join(WIDTHS)}, with commas between them")
        return ",".join(name for name in WIDTHS if name in names)

    @property
    def widths(self) -> list[str]:
        return self.width.split(",")

    @property
    def multiples(self) -> dict[str, int]:
        return {"hidden": self.round_hidden, "ffn": self.round_ffn}

    def importance(self, inputs: InputStatistics) -> Tensor:
        assert inputs.activity is not None
        return inputs.activity.sqrt()
