"""Fewer experts for tokens whose router is sure, decided while the model runs (mc-moe, section 2.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from secateur.core.errors import InputError

__all__ = [
    "FILE_NAME",
    "MedianRatio",
    "OnlineBlock",
    "OnlinePlan",
    "Renormalise",
    "Strategy",
    "protected",
    "reroute",
]

FILE_NAME = "odp.json"
FIRST_KEPT = 2
"""Blocks, from the first, that are never pruned online: what they lose is far more than others do."""


class OnlineBlock(BaseModel):
    """What calibration tells of one block.

    Attributes:
        block: its index.
        medians: of the probability of the second, third, ... expert of a token over that of its first.
        loss: squared change of the experts' output, relative, when that median decides and nothing is
            protected.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: int = Field(ge=0)
    medians: tuple[float, ...] = Field(min_length=1)
    loss: float | None = Field(None, ge=0)


class OnlinePlan(BaseModel):
    """`odp.json`: the blocks with experts, in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    blocks: tuple[OnlineBlock, ...] = Field(min_length=1)

    @classmethod
    def load(cls, path: str | Path) -> OnlinePlan:
        """Read the file, or that of a checkpoint folder. Raises `InputError`."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror})", f"{FILE_NAME} of a run of mc-moe"
            ) from error
        except ValidationError as error:
            raise InputError(
                f"{path} is no {FILE_NAME} ({error.errors()[0]['msg'].lower()})",
                "the file as a run of mc-moe wrote it",
                "copy it again",
            ) from error

    def dumps(self) -> str:
        """The text of the file."""
        return self.model_dump_json(indent=2) + "\n"

    def usual(self, most: int | None = None) -> list[int]:
        """The blocks that are pruned unless told otherwise: all but the first two of the model, or of these
        the `most` that lose least."""
        open_blocks = [block for block in self.blocks if block.block >= FIRST_KEPT]
        if most is not None:
            open_blocks = sorted(open_blocks, key=lambda one: (one.loss or 0.0, one.block))[:most]
        return sorted(block.block for block in open_blocks)


class Strategy(Protocol):
    """Decides which of its experts a token does without."""

    def drop(self, block: int, gates: Tensor) -> Tensor:
        """(tokens, k) bool from the (tokens, k) weights of a token's experts; one expert always stays."""


@dataclass(frozen=True)
class MedianRatio:
    """Without the experts that weigh less than a part of what the first weighs.

    Attributes:
        ratios: by block, that part, the same for all experts of a token but its first.
    """

    ratios: Mapping[int, float]

    def drop(self, block: int, gates: Tensor) -> Tensor:
        gates = gates.float()
        first = gates.argmax(1, keepdim=True)
        low = gates < self.ratios[block] * gates.gather(1, first)
        return low.scatter_(1, first, False)


@dataclass(frozen=True)
class Renormalise:
    """How a model's router makes weights of the probabilities that it chose.

    Attributes:
        to_one: their sum is made one; otherwise they stay as they are, and so they do here.
        scale: that follows.
    """

    to_one: bool
    scale: float = 1.0

    @classmethod
    def of(cls, config: Any) -> Renormalise:
        """As the configuration says; routers that it does not ask always make the sum one."""
        scale = getattr(config, "routed_scaling_factor", None)
        return cls(bool(getattr(config, "norm_topk_prob", True)), 1.0 if scale is None else float(scale))


def reroute(
    routes: Tensor, gates: Tensor, drop: Tensor, count: int, rule: Renormalise
) -> tuple[Tensor, Tensor]:
    """Routes and gates without the experts that are dropped.

    A dropped one points behind the last expert, which no implementation dispatches, with weight zero. Tokens
    that lose nothing keep their weights to the bit.

    Args:
        routes, gates: (tokens, k) experts and weights.
        drop: (tokens, k) bool.
        count: n, the number of experts.
        rule: of the model's own router.
    """
    kept = gates.masked_fill(drop, 0)
    if rule.to_one:
        wide = kept.float()
        whole = (wide / wide.sum(1, keepdim=True) * rule.scale).to(gates.dtype)
        kept = torch.where(drop.any(1, keepdim=True), whole, gates)
    return routes.masked_fill(drop, count), kept


def protected(importance: Tensor, real: Tensor, share: float) -> Tensor:
    """(B, L) bool: the most important tokens of each sequence, int(share * its real tokens) of them.

    Args:
        importance: (B, L).
        real: (B, L) bool; padding is never protected.
    """
    order = importance.masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return (ranks < (share * real.sum(1, keepdim=True)).long()) & real
