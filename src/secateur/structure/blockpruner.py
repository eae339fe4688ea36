"""BlockPruner: what the model misses least goes first, attention and feed-forward parts apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.structure.base import Piece, PieceLosses, PieceMethod, register

__all__ = ["BlockPruner"]


@register
class BlockPruner(PieceMethod):
    """Removes, again and again, the sub-block without which the perplexity is lowest
    (structured-baselines, section 2.4); with `unit=layer` whole blocks, as SLEB does (arXiv 2402.09025)."""

    id: ClassVar[str] = "blockpruner"
    paper: ClassVar[Paper | None] = Paper(
        "BlockPruner: Fine-grained Pruning for Large Language Models", 2024, "2406.10594"
    )

    shortlist: int | None = Field(
        None,
        ge=1,
        description="try only so many pieces a round: those that turn the hidden state least",
    )

    @property
    def needs_turns(self) -> bool:
        return self.shortlist is not None

    def tries(self, pieces: int) -> int:
        return min(self.shortlist or pieces, pieces)

    def pick(
        self, pieces: Sequence[Piece], turns: Mapping[str, float], losses: PieceLosses
    ) -> tuple[Piece, float]:
        tried = pieces
        if self.shortlist is not None:
            tried = sorted(pieces, key=lambda piece: turns[piece.name])[: self.shortlist]
        found = losses(tried)
        loss, best = min(zip(found, range(len(tried)), strict=True))
        return tried[best], loss
