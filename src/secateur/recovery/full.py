"""All weights of the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from secateur.core.method import Paper
from secateur.recovery.base import Training, register

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from secateur.anatomy.model import Anatomy
    from secateur.recovery.student import Student

__all__ = ["Full"]


@register
class Full(Training):
    """All weights of the blocks are trained; embeddings, last norm and head stay (adapt-pruner, section 2).

    Weights and moments are float32, 16 bytes a parameter; a GPU computes in bfloat16.
    """

    id: ClassVar[str] = "full"
    paper: ClassVar[Paper | None] = Paper(
        "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training",
        2025,
        "2502.03460",
    )

    learning_rate: float = Field(2e-5, ge=0, description="the highest of the run")
    keep_zeros: bool = Field(True, description="weights that are zero stay zero; false: they may grow again")

    def student(self, model: PreTrainedModel, anatomy: Anatomy, importance: Tensor | None) -> Student:
        from secateur.recovery.student import WholeStudent

        return WholeStudent(model, anatomy, keep_zeros=self.keep_zeros)
