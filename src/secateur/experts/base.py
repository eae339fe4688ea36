"""A method for routed experts: what it sees of a block, and what it says of each expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field

from secateur.core.method import METHODS, Method
from secateur.core.statistics import RoutingStatistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ExpertMethod", "ExpertProblem", "Survivors", "register"]


@dataclass
class ExpertProblem:
    """The routed experts of one block.

    Attributes:
        name: for messages, such as `3.experts`.
        top_k: experts that a token visits.
        router: (n, d) float32, one row an expert.
        bias: (n,) float32 that the router adds to its logits, if it has one.
        weights: by parameter, (n, out, in) of any floating dtype: the stacked matrices of all experts, each
            seen as (out, in) whatever the files hold; views of the block, not to be changed.
        routing: what was observed; `None` where the method needs nothing.
        generator: seeded for these very experts.
    """

    name: str
    top_k: int
    router: Tensor
    bias: Tensor | None
    weights: Mapping[str, Tensor]
    routing: RoutingStatistics | None
    generator: torch.Generator

    @property
    def count(self) -> int:
        """n, the number of routed experts."""
        return len(self.router)


@dataclass(frozen=True)
class Survivors:
    """What is left of the experts of one block.

    Attributes:
        kept: (k,) sorted int64: the places that stay.
        mix: (k, n) float32, how the weights of each place that stays are made of those of all; `None`: each
            stays as it was.
        router_mix: (k, n) float32, the same for the rows (and biases) of the router.
        clusters: which experts each place now stands for, for the report; empty where that means nothing.
    """

    kept: Tensor
    mix: Tensor | None = None
    router_mix: Tensor | None = None
    clusters: tuple[tuple[int, ...], ...] = ()


class ExpertMethod(Method):
    """Base of the methods that remove whole routed experts: score all, spend the budget, then look again.

    Class variables:
        comparable: scores of different blocks mean the same and need not be standardised.
    """

    family: ClassVar[str] = "experts"
    removes: ClassVar[str] = "routed experts"
    effect: ClassVar[str] = (
        "fewer bytes on disk and in memory; a token visits as many experts as before, so its time stays"
    )
    comparable: ClassVar[bool] = False

    spread: Literal["uniform", "global"] = Field(
        "uniform", description="uniform: as many in every block; global: one ranking of the whole model"
    )
    min_keep: int = Field(1, ge=1, description="experts that every block keeps at least")

    def score(self, problem: ExpertProblem) -> Tensor:
        """(n,) importance of each expert; the smallest go.

        A method that clusters gives the height at which an expert joins another, so that for every number
        that stays the right number of merges has happened; `regroup` then says which ones stand for them.
        """
        raise NotImplementedError

    def regroup(self, problem: ExpertProblem, kept: Tensor) -> Survivors:
        """What becomes of the experts when as many stay as in `kept`, (k,) sorted int64."""
        return Survivors(kept)


M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator: put a method into the catalogue under its `id`."""
    METHODS.register(method.id)(method)
    return method
