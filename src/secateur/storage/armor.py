"""A matrix as A S B: the blocks of A and B as they are, S as `nm` or `bitmask` packs it.

Parts of a matrix (P a, Q b):

    left     dtype (P, a, a)  blocks on the diagonal of A
    right    dtype (Q, b, b)  blocks on the diagonal of B
    core_*   the parts of S: `core_values`, `core_indices` of nm, or `core_mask`, `core_values` of bitmask

The matrix is the product in float32, rounded to dtype. It has no zeros to be packed by, so `pack` refuses: a
method gives the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.errors import InputError
from secateur.core.factored import Factored
from secateur.core.pattern import Pattern
from secateur.storage.bitmask import Bitmask
from secateur.storage.formats import FORMATS, Format, Packed, refused
from secateur.storage.nm import GroupsOfM

__all__ = ["FactoredFormat", "core_of", "core_parts", "packed"]

CORE = "core_"


@FORMATS.register("armor")
class FactoredFormat(Format):
    """See the module."""

    id: ClassVar[str] = "armor"
    parts: ClassVar[tuple[str, ...]] = ("left", "right")
    typed: ClassVar[tuple[str, ...]] = ("left", "right", "core_values")
    exact: ClassVar[bool] = False

    @classmethod
    def pack(cls, weight: Tensor, **_: Any) -> dict[str, Tensor]:
        """Raises `InputError`: a matrix alone does not say its factors."""
        raise InputError(
            "armor for a matrix without factors",
            "a method that finds them",
            "use --method armor -O store=factors",
        )

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        core = core_of(parts, shape)
        return Factored(parts["left"].float(), core.float(), parts["right"].float()).product().to(dtype)

    @classmethod
    def check(cls, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise refused(name, f"factors make a matrix, and it is of {shape}")
        for part, length in zip(cls.parts, shape, strict=True):
            blocks = tuple(parts[part].shape)
            if len(blocks) != 3 or blocks[1] != blocks[2] or blocks[0] * blocks[1] != length:
                raise refused(
                    name, f"its {part} of {blocks} is not of square blocks on a diagonal of {length}"
                )
        inner, found = core_parts(parts)
        for part in inner.parts:
            if part not in found:
                raise refused(name, f"{name}.{CORE}{part} is missing")
        inner.check(found, name, shape)


def packed(factored: Factored, dtype: torch.dtype, pattern: Pattern) -> Packed:
    """Factors, each rounded to `dtype`, in place of a matrix of it; `pattern` is that of the core."""
    core = factored.core.to("cpu", dtype) + 0.0  # a product may have left -0.0, which counts as a weight
    groups = pattern.kind == "n:m"
    parts = GroupsOfM.pack(core, of=pattern.of, keep=pattern.keep) if groups else Bitmask.pack(core)
    blocks = {name: getattr(factored, name).to("cpu", dtype) for name in FactoredFormat.parts}
    return Packed(
        FactoredFormat.id,
        tuple(core.shape),
        dtype,
        blocks | {CORE + name: part for name, part in parts.items()},
    )


def core_of(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """(outputs, inputs) S."""
    inner, found = core_parts(parts)
    return inner.unpack(found, shape, parts["left"].dtype)


def core_parts(parts: Mapping[str, Tensor]) -> tuple[type[Format], dict[str, Tensor]]:
    """The format of S, which its parts tell, and those."""
    found = {name.removeprefix(CORE): part for name, part in parts.items() if name.startswith(CORE)}
    return (Bitmask if "mask" in found else GroupsOfM), found
