"""Least squares on the outputs of the dense model, without a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.errors import RecipeError
from secateur.recovery.base import RecoveryMethod, register

if TYPE_CHECKING:
    from secateur.anatomy.model import Anatomy

__all__ = ["Refit"]


@register
class Refit(RecoveryMethod):
    """Least squares for the matrices that write into the residual stream: after each of them the stream comes
    closest to that of the dense model (structured-baselines, sections 2.5 and 4), block by block.

    Inputs are those of the blocks refitted before. Zeros stay. A matrix whose error on windows that were
    kept back would not fall keeps its weights, and the report says so.
    """

    id: ClassVar[str] = "refit"
    effect: ClassVar[str] = "the same shapes and zeros, outputs nearer to those of the dense model"
    needs_teacher: ClassVar[bool] = True

    damping: float = Field(
        0.01,
        gt=0,
        description="of the mean square of the inputs, holds weights where they were; 10 and 100 times too",
    )
    solver_steps: int = Field(100, ge=1, description="of conjugate gradients, for matrices with zeros")

    def check(self, anatomy: Anatomy) -> None:
        from secateur.recovery.stream import writers

        if not any(writers(block) for block in anatomy.blocks):
            raise RecipeError(
                f"refit of {anatomy.family!r}, where no plain matrix writes into the residual stream",
                "attention or a feed-forward part with an output matrix",
                "train instead: --how full",
            )
