"""Which tensors of a checkpoint are packed: those that become smaller."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from secateur.checkpoint.packing import DENSE
from secateur.core.errors import InputError, RecipeError
from secateur.storage.formats import FORMATS, Packed

__all__ = ["Packer", "packer_for"]

ENTRIES_BYTES = 512
"""What the entries of a packed tensor take in the header of a file, about."""
CORNER = 256
"""Rows and columns by which formats are compared."""


def packer_for(format: str) -> Packer | None:
    """What packs in a format; None for `dense`. Raises `RecipeError` for an unknown one."""
    return None if format == DENSE else Packer(format)


class Packer:
    """Packs the tensors of a part of a checkpoint (`CheckpointWriter(pack=...)`); what is packed stays.

    The experts of a layer, which become one tensor in memory, are packed all or none.

    Args:
        format: id of a format.

    Raises:
        RecipeError: an unknown format, or one that rounds.
    """

    def __init__(self, format: str) -> None:
        asked = FORMATS.get(format)
        if not asked.exact:
            raise RecipeError(
                f"format {format!r}, which rounds",
                "a format of weights with zeros",
                "use --method mc-moe or armor",
            )
        self._formats = (format, *asked.others)

    def __call__(self, tensors: Mapping[str, Tensor | Packed]) -> dict[str, Tensor | Packed]:
        groups: dict[str, dict[str, Tensor | Packed]] = defaultdict(dict)
        for name, tensor in tensors.items():
            groups[_group(name)][name] = tensor
        packed: dict[str, Tensor | Packed] = {}
        for group in groups.values():
            packed |= self._smaller(group)
        return {name: packed[name] for name in tensors}

    def _smaller(self, group: dict[str, Tensor | Packed]) -> Mapping[str, Tensor | Packed]:
        """All packed, or as they are where that takes no more bytes or cannot be."""
        plain_bytes = sum(tensor.nbytes for tensor in group.values())
        for format in self._likeliest_first(next(iter(group.values()))):
            try:
                packed = {name: _packed(tensor, format) for name, tensor in group.items()}
            except InputError:
                continue
            if sum(one.nbytes + ENTRIES_BYTES for one in packed.values()) < plain_bytes:
                return packed
        return group

    def _likeliest_first(self, tensor: Tensor | Packed) -> Sequence[str]:
        """The formats by the bytes that a corner of a tensor takes: packing the whole of it takes long."""
        if isinstance(tensor, Packed) or tensor.ndim < 2 or len(self._formats) == 1:
            return self._formats
        corner = tensor[..., :CORNER, :CORNER]
        return sorted(self._formats, key=lambda format: _bytes(corner, format))


def _bytes(tensor: Tensor, format: str) -> float:
    try:
        return Packed.of(tensor, format).nbytes
    except InputError:
        return math.inf


def _packed(tensor: Tensor | Packed, format: str) -> Packed:
    return tensor if isinstance(tensor, Packed) else Packed.of(tensor, format)


def _group(name: str) -> str:
    """One for all experts that lie in tensors of their own, their biases apart."""
    before, experts, own = name.partition(".experts.")
    number, _, rest = own.partition(".")
    return f"{before}{experts}{rest.rpartition('.')[2]}" if number.isdigit() else name
