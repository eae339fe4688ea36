"""How wide a model becomes when the same goes everywhere: candidate widths and which of them come first.

Every count is exact: it is that of the shapes that come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from secateur.anatomy.cut import cut_shapes, residual_spaces
from secateur.anatomy.model import Anatomy, Block
from secateur.anatomy.units import Units, units_of
from secateur.core.errors import AnatomyError

__all__ = ["TOLERANCE", "Dimension", "Widths", "candidates", "dimensions", "evenest", "freed", "largest"]

TOLERANCE = 0.01
"""How far from the budget, as a fraction of the parameters in blocks, evenness may lead."""

Widths = Mapping[str, int]
"""By name of a dimension, what stays of it."""


@dataclass(frozen=True)
class Dimension:
    """A width that is the same in all blocks.

    Attributes:
        name: `hidden`, `heads` or `ffn`.
        count: how many units there are.
        step: what stays is a multiple of this.
        spaces: by space, how many entries one unit stands for.
        units: those of one block, of a dimension inside the blocks; heads may be in several groups.
        groups: key-value heads that each keep as many query heads as `count` says; 1 where heads go with
            their keys and values.
    """

    name: str
    count: int
    step: int
    spaces: Mapping[str, int]
    units: Units | None = None
    groups: int = 1

    def sizes(self, count: int) -> dict[str, int]:
        """Entries of its spaces when `count` units stay."""
        return {space: entries * count for space, entries in self.spaces.items()}

    def choices(self) -> Iterator[int]:
        """All legal counts, the present one first."""
        yield self.count
        yield from range((self.count - 1) // self.step * self.step, 0, -self.step)


def dimensions(anatomy: Anatomy, names: Iterable[str], steps: Mapping[str, int]) -> list[Dimension]:
    """The dimensions of these names, of a model whose blocks are alike.

    Raises:
        AnatomyError: blocks that differ, experts, or a dimension that the model does not have.
    """
    block = anatomy.blocks[0]
    if any(other.axes != block.axes for other in anatomy.blocks):
        raise AnatomyError(
            f"blocks of {anatomy.family!r} that differ in size", "blocks that are alike", "use flap instead"
        )
    if any(matrix.expert is not None for matrix in block.matrices):
        raise AnatomyError(
            f"experts of {anatomy.family!r}", "one feed-forward part a block", "use flap instead"
        )
    found = {dimension.name: dimension for dimension in _all(anatomy, block, steps)}
    if missing := [name for name in names if name not in found]:
        raise AnatomyError(
            f"width {missing[0]} of {anatomy.family!r}",
            f"one of {', '.join(found) or 'none'}",
            "choose with -O width=",
        )
    return [found[name] for name in found if name in set(names)]


def _all(anatomy: Anatomy, block: Block, steps: Mapping[str, int]) -> Iterator[Dimension]:
    kinds = {units.kind: units for units in units_of(block)}
    outer_known = anatomy.outer.keys() <= anatomy.outer_axes.keys()
    if "hidden" in anatomy.spaces and "hidden" in anatomy.keys and outer_known:
        spaces = dict.fromkeys(residual_spaces(anatomy), 1)
        yield Dimension("hidden", anatomy.spaces["hidden"], steps.get("hidden", 1), spaces)
    for kind, units in kinds.items():
        if kind == "ffn":
            yield Dimension("ffn", units.count, steps.get("ffn", 1), {"ffn": 1}, units)
        elif kind == "kv_groups" and units.spaces["heads"] > 1:
            spaces = {"heads": units.count}
            yield Dimension("heads", units.spaces["heads"], 1, spaces, units, groups=units.count)
        else:
            yield Dimension("heads", units.count, 1, units.spaces, units)


def freed(anatomy: Anatomy, chosen: Iterable[Dimension], widths: Widths) -> int:
    """Parameters of the blocks that these widths remove."""
    sizes = {space: n for one in chosen for space, n in one.sizes(widths[one.name]).items()}
    shapes = cut_shapes(anatomy.blocks[0], sizes).values()
    return len(anatomy.blocks) * (anatomy.blocks[0].size - sum(map(prod, shapes)))


def candidates(
    anatomy: Anatomy, chosen: list[Dimension], sparsity: float, least: float = 0.0
) -> list[tuple[Widths, float]]:
    """Smaller widths near a budget, and the fraction of the block parameters that each removes.

    All legal counts of all dimensions but the last are combined; the last follows from the budget.

    Args:
        least: fraction of every dimension that stays.
    """
    *coarse, fine = chosen
    budget, whole = sparsity * anatomy.block_parameters, anatomy.block_parameters
    found: list[tuple[Widths, float]] = []
    for counts in product(*([n for n in one.choices() if n >= least * one.count] for one in coarse)):
        fixed = dict(zip((one.name for one in coarse), counts, strict=True))
        all_stay = freed(anatomy, chosen, {**fixed, fine.name: fine.count})
        all_but_one = freed(anatomy, chosen, {**fixed, fine.name: fine.count - 1})
        wanted = fine.count - (budget - all_stay) / (all_but_one - all_stay)
        count = _legal(fine, wanted)
        widths = {**fixed, fine.name: count}
        if count >= least * fine.count and _fits(anatomy, chosen, widths):
            found.append((widths, freed(anatomy, chosen, widths) / whole))
    return [one for one in found if one[1] > 0]


def _legal(dimension: Dimension, wanted: float) -> int:
    """The legal count next to what is wanted."""
    down = max(dimension.step, round(wanted / dimension.step) * dimension.step)
    return min((n for n in (dimension.count, down) if n <= dimension.count), key=lambda n: abs(n - wanted))


def _fits(anatomy: Anatomy, chosen: list[Dimension], widths: Widths) -> bool:
    """Whether heads fill the hidden size, where the family derives their width from it."""
    if "head_dim" in anatomy.keys or "heads" not in anatomy.spaces:
        return True
    sizes = {space: n for one in chosen for space, n in one.sizes(widths[one.name]).items()}
    heads, hidden = anatomy.spaces["heads"], anatomy.spaces["hidden"]
    return sizes.get("heads", heads) * (hidden // heads) == sizes.get("hidden", hidden)


def evenest(
    found: list[tuple[Widths, float]], chosen: list[Dimension], sparsity: float
) -> Iterator[tuple[Widths, float]]:
    """Candidates in order of preference: near the budget first, then those that keep alike of everything."""

    def cost(candidate: tuple[Widths, float]) -> tuple[float, float]:
        widths, removed = candidate
        kept = [widths[one.name] / one.count for one in chosen]
        return max(0.0, abs(removed - sparsity) - TOLERANCE), max(kept) - min(kept)

    yield from sorted(found, key=cost)


def largest(found: list[tuple[Widths, float]], sparsity: float) -> Iterator[tuple[Widths, float]]:
    """Candidates within the budget, the largest model first."""
    yield from sorted((one for one in found if one[1] >= sparsity), key=lambda one: one[1])
