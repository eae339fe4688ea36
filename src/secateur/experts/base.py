"""A method for routed experts: what it sees of a block, and what it says of each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.anatomy.mixture import mixture_of
from secateur.anatomy.model import Block
from secateur.core.method import EXPERTS, Method, register
from secateur.core.statistics import RoutingStatistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ExpertMethod", "ExpertProblem", "Survivors", "expert_problem", "register"]


@dataclass
class ExpertProblem:
    """The routed experts of one block.

    Attributes:
        name: for messages, such as `3.experts`.
        top_k: experts that a token visits.
        router: (n, d) float32, one row an expert.
        bias: (n,) float32 that the router adds to its logits, or to its scores where it chooses, if it does.
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

    def part(self, rows: Tensor) -> ExpertProblem:
        """These experts alone, int64: a group of a router that chooses among groups.

        Weights of neighbours are views.
        """
        return replace(
            self,
            router=self.router[rows],
            bias=None if self.bias is None else self.bias[rows],
            weights={name: stacked[_rows(rows)] for name, stacked in self.weights.items()},
            routing=None if self.routing is None else self.routing.part(rows),
        )

    @property
    def observed(self) -> RoutingStatistics:
        """What was observed, by a method that asked for it."""
        if self.routing is None:
            raise ValueError(f"the routing of {self.name} was not observed")
        return self.routing


def _rows(rows: Tensor) -> Tensor | slice:
    """The same rows, as a slice where they are neighbours in order: what it takes is not copied."""
    start = int(rows[0])
    return slice(start, start + len(rows)) if bool((rows.diff() == 1).all()) else rows


def expert_problem(
    block: Block,
    parameters: Mapping[str, Tensor],
    *,
    top_k: int,
    generator: torch.Generator,
    routing: RoutingStatistics | None = None,
) -> ExpertProblem | None:
    """The routed experts of one block as methods see them, `None` where it has none.

    Args:
        block: what it is made of.
        parameters: its in-memory tensors by their name inside the block.
        top_k: experts that a token visits.
        generator: seeded for these very experts.
        routing: what was observed.

    Raises:
        AnatomyError: experts without a router that the axes of the block name.
    """
    mixture = mixture_of(block)
    if mixture is None:
        return None
    added = mixture.bias or mixture.correction
    return ExpertProblem(
        name=f"{block.index}.{mixture.space}",
        top_k=top_k,
        router=parameters[mixture.router].detach().float().cpu(),
        bias=parameters[added].detach().float().cpu() if added else None,
        weights=mixture.weights(parameters),
        routing=routing,
        generator=generator,
    )


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
        regrouping: own options that scores do not depend on.
    """

    family: ClassVar[str] = "experts"
    removes: ClassVar[str] = EXPERTS
    effect: ClassVar[str] = (
        "fewer bytes on disk and in memory; a token visits as many experts as before, so its time stays"
    )
    comparable: ClassVar[bool] = False
    regrouping: ClassVar[frozenset[str]] = frozenset()

    spread: Literal["uniform", "global"] = Field(
        "uniform", description="uniform: as many in every block; global: one ranking of the whole model"
    )
    min_keep: int = Field(1, ge=1, description="experts that every block keeps at least")

    def check(self, counts: Sequence[int]) -> None:
        """Refuse, before anything is read, options that so many experts of each block (of each group of its
        router) do not allow.

        Raises:
            RecipeError: which.
        """

    def score(self, problem: ExpertProblem) -> Tensor:
        """(n,) importance of each expert; the smallest go.

        A method that clusters gives the height at which an expert joins another, so that for every number
        that stays the right number of merges has happened; `regroup` then says which ones stand for them.
        Scores that are comparable between blocks may be infinite: minus for what goes before all others,
        plus for what stays in any case.
        """
        raise NotImplementedError

    def regroup(self, problem: ExpertProblem, kept: Tensor) -> Survivors:
        """What becomes of the experts when as many stay as in `kept`, (k,) sorted int64."""
        return Survivors(kept)
