"""What blocks with the same parameters have in common, worked out once for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.anatomy.model import Axis, Block, Matrix, Shape, Site

__all__ = ["Template"]


@dataclass(frozen=True)
class Template:
    """Everything about a block but its place; see `Block`."""

    matrices: tuple[Matrix, ...]
    sites: dict[str, Site]
    axes: dict[str, tuple[Axis, ...]]
    shapes: dict[str, Shape]

    def block(self, path: str, index: int) -> Block:
        """Block `index` of the list at `path`."""
        return Block(index, f"{path}.{index}", self.matrices, self.sites, self.shapes, self.axes)
