"""A model seen from outside: names, shapes, tied parameters, embedding and head."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.anatomy.model import Shape

__all__ = ["Outline"]


@dataclass(frozen=True)
class Outline:
    """What an anatomy is made from, whether seen in a model or predicted from its config.

    Attributes:
        shapes: of each block, parameters and persistent buffers by name inside the block.
        transposed: of each block, module path -> whether it stores its matrices as (in, out), where the
            module says.
        outer: the same outside the blocks, without aliases.
        tied: alias -> name in `outer`.
        base_prefix, embedding, head: module paths; the prefix is empty without a base model inside.
    """

    shapes: list[dict[str, Shape]]
    transposed: list[dict[str, bool]]
    outer: dict[str, Shape]
    tied: dict[str, str]
    base_prefix: str
    embedding: str
    head: str
