"""Bits and bytes of tensors, without a loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import InputError
from secateur.core.transforms import runs_as_called

__all__ = ["as_matrix", "gather", "not_zero", "pack_bits", "rows_and_columns", "spread", "unpack_bits"]

PIECE = 1 << 18
"""Elements that are spread at a time, so that what is needed besides stays in the cache."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor of any shape as a matrix: all axes but the last are rows."""
    return (prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def as_matrix(weight: Tensor) -> Tensor:
    """`rows_and_columns` of a floating tensor, on the CPU. Raises `InputError` for any other dtype."""
    if not weight.is_floating_point():
        raise InputError(f"a tensor of {weight.dtype}", "floating weights", "keep it as it is")
    return weight.detach().cpu().reshape(rows_and_columns(weight.shape)).contiguous()


def not_zero(weight: Tensor) -> Tensor:
    """Where any bit is set: bool, so that -0.0 and NaN are kept as they are."""
    return weight.view(INTEGERS[weight.itemsize]) != 0


def pack_bits(bits: Tensor) -> Tensor:
    """(r, c) bool -> (r, ceil(c / 8)) uint8; column j is bit j % 8 of byte j // 8, bits beyond are 0."""
    return torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: (r, columns) bool on the same device."""
    if packed.device.type == "cpu" and runs_as_called():
        bits = np.unpackbits(packed.numpy(), axis=-1, count=columns, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    spread = (packed[..., None] >> places) & 1
    return spread.flatten(-2)[..., :columns].bool()


def gather(tensor: Tensor, mask: Tensor) -> Tensor:
    """The elements of a tensor on the CPU where a bool mask of its shape is set, in their order: (count,).

    Several times as fast as indexing by the mask, in torch and in numpy.
    """
    chosen = np.compress(mask.contiguous().view(-1).numpy(), _integers(tensor.reshape(-1)))
    if not chosen.size:  # torch gives an empty array a stride of 0, which cannot be viewed as bytes
        return tensor.new_empty(0)
    return torch.from_numpy(chosen).view(tensor.dtype)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `gather`: a tensor of the shape of the mask, +0.0 where it is not set."""
    if values.device.type != "cpu" or not runs_as_called():
        return values.new_zeros(mask.shape).masked_scatter_(mask, values)
    table = np.concatenate([np.zeros(1, _integers(values).dtype), _integers(values)])
    flat, done = mask.contiguous().view(-1).numpy(), 0
    whole = np.empty(flat.size, table.dtype)
    for start in range(0, flat.size, PIECE):  # each element is that of its rank in the table, or the first
        piece = flat[start : start + PIECE]
        ranks = np.cumsum(piece, dtype=np.int64)
        count = int(ranks[-1])
        ranks += done
        ranks *= piece
        np.take(table, ranks, out=whole[start : start + PIECE], mode="wrap")
        done += count
    return torch.from_numpy(whole).view(values.dtype).view(mask.shape)


def _integers(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(INTEGERS[tensor.itemsize]).numpy()
