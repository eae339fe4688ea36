"""A method that keeps every expert, in fewer bits: what it sees, and what it says of each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from secateur.core.method import BITS, Method
from secateur.core.statistics import Statistic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PrecisionMethod", "Rounding"]


@dataclass(frozen=True)
class Rounding:
    """What rounding does to the experts of one block.

    Attributes:
        block: its index.
        count: n, the number of routed experts.
        visits: (n,) float64, calibration tokens that visited each expert.
        probabilities: (n,) float64, sum over them of its probability among all experts.
        errors: (n, levels) float64, how far the output of the block moves when this expert alone is plainly
            rounded to the bits of each level (mc-moe, section 2.2).

    The last three are None before they are observed, and where the method needs none.
    """

    block: int
    count: int
    visits: Tensor | None = None
    probabilities: Tensor | None = None
    errors: Tensor | None = None


class PrecisionMethod(Method):
    """Base of the methods that store weights in few bits; nothing is removed.

    Matrices are rounded block by block, each for inputs that went through the rounded blocks before it. What
    is no matrix of a block (router, norms, embeddings) stays as it is.
    """

    family: ClassVar[str] = "precision"
    removes: ClassVar[str] = BITS
    effect: ClassVar[str] = (
        "fewer bytes on disk; the arithmetic is that of the dense model, with the weights unpacked"
    )
    sized_by: ClassVar[str] = "bits"

    dense_bits: int = Field(
        4, ge=0, le=8, description="bits of the matrices that are not of routed experts; 0: as they are"
    )
    group_size: int = Field(128, ge=1, description="inputs of a row that share a scale")
    rounding: Literal["gptq", "nearest"] = Field(
        "gptq", description="gptq: later columns make up for the rounding of earlier ones; or nearest"
    )
    damping: float = Field(0.01, ge=0, le=1, description="fraction of the mean diagonal added to the Hessian")
    grid_steps: int = Field(
        101, ge=0, description="sizes of a grid that are tried, 0.9 to 1.1 times the range; 0: the range"
    )

    @property
    def statistics(self) -> frozenset[Statistic]:
        hessian: frozenset[Statistic] = frozenset({"hessian"} if self.rounding == "gptq" else ())
        return self.needs | hessian

    @property
    def levels(self) -> tuple[int, ...]:
        """Bits whose errors are wanted of every expert; none: nothing is observed before rounding."""
        return ()

    @property
    def average_bits(self) -> float:
        """Bits of a weight of the experts that are asked for."""
        raise NotImplementedError

    @property
    def other_bits(self) -> int:
        """Bits of the matrices of a model that has no experts; 0 where the method is about experts."""
        return 0

    def allot(self, blocks: Sequence[Rounding]) -> list[list[int]]:
        """Bits of every expert, block by block; without errors, any bits that are possible, or a refusal.

        Raises:
            RecipeError: options that these experts cannot meet.
        """
        raise NotImplementedError
