"""SliceGPT: a smaller residual stream, along the principal components of what it carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secateur.core.method import Paper
from secateur.core.statistics import Statistic
from secateur.structure.base import SliceMethod, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SliceGPT"]


@register
class SliceGPT(SliceMethod):
    """Principal components of the signal at every place of the residual stream, of the prefix sliced so far
    (structured-baselines, section 2.2).

    `--sparsity` counts the shortcut matrices that come on top, so more of the hidden size goes than it says.
    The damping that the paper adds to the diagonal does not change the components and is left out.
    """

    id: ClassVar[str] = "slicegpt"
    paper: ClassVar[Paper | None] = Paper(
        "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", 2024, "2401.15024"
    )
    needs: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})

    def directions(self, covariance: Tensor) -> Tensor:
        import torch

        components: Tensor = torch.linalg.eigh(covariance)[1]
        return components.flip(1)
