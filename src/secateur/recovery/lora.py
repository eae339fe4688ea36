"""Low-rank adapters, merged back."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.errors import RecipeError
from secateur.core.method import Paper
from secateur.recovery.base import Training, register

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from secateur.anatomy.model import Anatomy
    from secateur.recovery.student import Student

__all__ = ["Lora", "spread_ranks"]

SHARPNESS = 13.1072
"""Of the sigmoid, per unit of angle / pi (cfsp, section 2.2)."""


@register
class Lora(Training):
    """A low-rank change of every linear layer of the blocks, trained by peft (llm-pruner, section 2.6) and
    merged into the weights: W + alpha / rank * B A.

    Where weights are zero the change is zero too, in training as in the result, so merging loses nothing.
    Experts that lie in one parameter have no adapters; they stay as they are with `skip_experts`.
    """

    id: ClassVar[str] = "lora"
    paper: ClassVar[Paper | None] = Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"
    )
    packages: ClassVar[tuple[str, ...]] = ("peft",)
    trains_weights: ClassVar[bool] = False

    rank: int = Field(8, ge=1, description="of the change, on average over the blocks")
    alpha: float = Field(16.0, gt=0, description="the change is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="of the inputs of the adapters")
    rank_from: Literal["uniform", "importance"] = Field(
        "uniform", description="importance: more rank where a block turns the hidden state more (IG-LoRA)"
    )
    keep_zeros: bool = Field(True, description="weights that are zero stay zero; false: they may grow again")
    skip_experts: bool = Field(False, description="leave fused experts as they are and train the rest")

    def check(self, anatomy: Anatomy) -> None:
        if not self.skip_experts and any(m.expert is not None for b in anatomy.blocks for m in b.matrices):
            raise RecipeError(
                f"lora on {anatomy.family!r}, whose experts lie in one parameter",
                "linear layers",
                "train all weights: --how full, or leave the experts as they are: -O skip_experts=true",
            )

    def check_importance(self, importance: Tensor | None, blocks: int) -> None:
        if self.rank_from == "importance" and (importance is None or len(importance) != blocks):
            raise RecipeError(
                "rank_from importance without the importance of the blocks",
                "a model whose scores.safetensors has 'turns', a number a block",
                "prune with -O spread=sigmoid (cfsp does), or use rank_from=uniform",
            )

    def student(self, model: PreTrainedModel, anatomy: Anatomy, importance: Tensor | None) -> Student:
        from secateur.recovery.adapters import AdaptedStudent

        ranks = [self.rank] * len(anatomy.blocks)
        if self.rank_from == "importance":
            assert importance is not None
            ranks = spread_ranks(importance, self.rank)
        return AdaptedStudent(
            model,
            anatomy,
            ranks,
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            keep_zeros=self.keep_zeros,
        )


def spread_ranks(importance: Tensor, rank: int) -> list[int]:
    """A rank a block in proportion to the sigmoid of its importance, from 1 to 4 times `rank`, whose sum is
    that of the same rank everywhere (cfsp, section 2.5).

    Args:
        importance: (L,) mean angle between what enters and leaves a block, divided by pi.
    """
    import torch

    share = torch.sigmoid(SHARPNESS * (importance.double() - importance.double().mean()))
    wanted = (share / share.mean() * rank).clamp(1, 4 * rank)
    ranks = wanted.floor().long()
    rest = rank * len(ranks) - int(ranks.sum())
    order = (wanted - ranks).argsort(descending=True, stable=True).tolist()
    for block in (order * (1 + rest // len(order)))[:rest]:
        ranks[block] += 1
    return [int(value) for value in ranks]
