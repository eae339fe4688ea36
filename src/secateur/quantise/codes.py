"""Codes of a few bits without gaps between them: a little-endian stream of bits for every row."""

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np
import torch
from torch import Tensor

from secateur.core.transforms import runs_as_called

__all__ = ["pack_codes", "row_bytes", "unpack_codes"]

LOOKED_UP = (1, 2, 3, 4, 6)
"""Bits of which a table on the CPU is quicker than shifts."""


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row: its bits, rounded up."""
    return -(-columns * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(..., columns) uint8 below 2**bits, to (..., bytes) uint8; a row ends with zeros up to a whole byte."""
    count, width = _unit(bits)
    columns = codes.shape[-1]
    units = _in_units(codes, count).to(_word(width))
    word = (units << _shifts(count, bits, codes.device)).sum(-1, keepdim=True)
    stream = (word >> _shifts(width, 8, codes.device)) & 255
    packed: Tensor = stream.to(torch.uint8).flatten(-2)[..., : row_bytes(columns, bits)]
    return packed.contiguous()


def unpack_codes(stream: Tensor, bits: int, columns: int) -> Tensor:
    """The (..., columns) uint8 codes of (..., bytes) uint8."""
    count, width = _unit(bits)
    if bits == 8:
        return stream[..., :columns].contiguous()
    if bits in LOOKED_UP and stream.is_cpu and runs_as_called():
        return _looked_up(stream, bits, columns)
    word = _in_units(stream, width)
    if width > 1:
        wide = word.to(_word(width)) << _shifts(width, 8, stream.device)
        word = wide.sum(-1, keepdim=True, dtype=wide.dtype)
    codes = (word >> _shifts(count, bits, stream.device)) & (2**bits - 1)
    found: Tensor = codes.to(torch.uint8).flatten(-2)[..., :columns]
    return found.contiguous()


def _looked_up(stream: Tensor, bits: int, columns: int) -> Tensor:
    """The same where a byte, or one and a half, hold whole codes: all at once, as one wide integer."""
    index = stream.int()
    if 8 % bits:
        first, second, third = _in_units(index, 3).unbind(-1)
        index = torch.stack((first | (second & 15) << 8, second >> 4 | third << 4), -1)
    codes = torch.from_numpy(_table(bits)).index_select(0, index.flatten()).view(torch.uint8)
    return codes.view(*stream.shape[:-1], -1)[..., :columns].contiguous()


@cache
def _table(bits: int) -> np.ndarray:
    """By the value of a byte, or of twelve bits, its codes: a byte each, of one integer."""
    width = 12 if 8 % bits else 8
    codes = np.arange(2**width)[:, None] >> np.arange(0, width, bits) & (2**bits - 1)
    table: np.ndarray = codes.astype(np.uint8).view(f"i{width // bits}")[:, 0]
    return table


def _in_units(tensor: Tensor, size: int) -> Tensor:
    """(..., columns) as (..., units, size), filled up with zeros."""
    padded = torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % size))
    return padded.view(*padded.shape[:-1], -1, size)


def _unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and these bytes."""
    shared = gcd(bits, 8)
    return 8 // shared, bits // shared


def _word(width: int) -> torch.dtype:
    return torch.int32 if width < 4 else torch.int64


def _shifts(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(
        0, count * bits, bits, device=device, dtype=torch.int32 if count * bits <= 24 else None
    )
