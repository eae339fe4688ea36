"""Which tensors of a checkpoint are packed: those that become smaller."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from secateur.checkpoint.packing import DENSE
from secateur.core.errors import InputError, RecipeError
from secateur.storage.formats import FORMATS, Packed

__all__ = ["Packer", "packer_for"]

ENTRIES_BYTES = 512
"""What the entries of a packed tensor take in the header of a file, about."""


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
        if not FORMATS.get(format).exact:
            raise RecipeError(
                f"format {format!r}, which rounds",
                "a format of weights with zeros",
                "use --method mc-moe or armor",
            )
        self.format = format

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
        try:
            packed = {name: self._packed(tensor) for name, tensor in group.items()}
        except InputError:
            return group
        plain_bytes = sum(tensor.nbytes for tensor in group.values())
        return packed if sum(one.nbytes + ENTRIES_BYTES for one in packed.values()) < plain_bytes else group

    def _packed(self, tensor: Tensor | Packed) -> Packed:
        return tensor if isinstance(tensor, Packed) else Packed.of(tensor, self.format)


def _group(name: str) -> str:
    before, experts, _ = name.partition(".experts.")
    return before + experts if experts else name
