"""An allocation: one look at every block, then one sparsity for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from secateur.core.errors import RecipeError
from secateur.core.method import Method
from secateur.core.pattern import Pattern
from secateur.core.registry import Registry
from secateur.core.statistics import InputStatistics

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "Measured",
    "NamedMatrix",
    "register",
    "rescaled",
    "shifted",
    "weighted_mean",
]

ALLOCATIONS: Registry[type[Allocation]] = Registry(
    "allocation",
    "secateur.allocations",
    {name: f"secateur.weights.allocation.{name}" for name in ("uniform", "owl", "alpha")},
)

NamedMatrix: TypeAlias = "tuple[str, Tensor, InputStatistics | None]"
"""Name, weight (out, in) float32, and what was observed of its input."""
Measured = dict[str, Any]
"""What `measure` says of one block: numbers that fit into JSON."""

CEILING = 0.99
"""No block is pruned further than this, unless the whole model is."""

BISECTIONS = 100


class Allocation(Method):
    """Base of the allocations.

    Class variables:
        needs_pass: what `measure` looks at: nothing, the weights alone, or also the dense model's
            activations (the statistics in `needs`).
        fits_groups: whether it can be combined with an N:M pattern.
    """

    family: ClassVar[str] = "allocation"
    removes: ClassVar[str] = "nothing by itself: it spreads the sparsity over the blocks"
    effect: ClassVar[str] = "blocks of different sparsity; the whole model has the sparsity asked for"
    needs_pass: ClassVar[Literal["none", "weights", "activations"]] = "none"
    fits_groups: ClassVar[bool] = False

    def check_pattern(self, pattern: Pattern) -> None:
        """Raises `RecipeError` for an N:M pattern, whose sparsity is the same everywhere by nature."""
        if pattern.kind == "n:m" and not self.fits_groups:
            raise RecipeError(
                f"allocation {self.id!r} with pattern {pattern}",
                "one sparsity in all blocks, which is what N:M means",
                "leave out --allocation or choose --pattern unstructured",
            )

    def measure(self, block_index: int, matrices: list[NamedMatrix]) -> Measured:
        """Look at one block of the dense model; called once a block, in order."""
        return {}

    def sparsities(self, measured: list[Measured], sizes: list[int], sparsity: float) -> list[float]:
        """One sparsity a block.

        Args:
            measured: results of `measure`, in order.
            sizes: prunable parameters of each block.
            sparsity: fraction of all prunable parameters to remove.

        Returns:
            Sparsities in [0, 1).
        """
        raise NotImplementedError


def register(allocation: type[Allocation]) -> type[Allocation]:
    """Class decorator: put an allocation into the catalogue under its `id`."""
    ALLOCATIONS.register(allocation.id)(allocation)
    return allocation


def weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Mean of `values` over the parameters of the blocks."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def shifted(values: Sequence[float], sizes: Sequence[int], mean: float) -> list[float]:
    """`values` moved together until their mean over parameters is `mean`, none below 0 or above `CEILING`.

    What the limits cut off goes to the blocks that are free to take it.
    """
    high = max(CEILING, mean)
    low_shift, high_shift = -max(values), high - min(values)
    return _reach(lambda shift: [value + shift for value in values], low_shift, high_shift, sizes, mean)


def rescaled(ratios: Sequence[float], sizes: Sequence[int], mean: float) -> list[float]:
    """Positive `ratios` times one number such that their mean over parameters is `mean`, none above
    `CEILING`."""
    high = max(CEILING, mean)
    return _reach(lambda scale: [ratio * scale for ratio in ratios], 0.0, high / min(ratios), sizes, mean)


def _reach(
    family: Callable[[float], list[float]], low: float, high: float, sizes: Sequence[int], mean: float
) -> list[float]:
    """Bisection: the member of a rising family whose mean, limits applied, is `mean`."""
    ceiling = max(CEILING, mean)

    def limited(parameter: float) -> list[float]:
        return [min(max(value, 0.0), ceiling) for value in family(parameter)]

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if weighted_mean(limited(middle), sizes) < mean:
            low = middle
        else:
            high = middle
    return limited(high)
