"""Codes of a few bits without gaps between them: a little-endian stream of bits for every row."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

__all__ = ["pack_codes", "row_bytes", "unpack_codes"]


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row: its bits, rounded up."""
    return -(-columns * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(..., columns) uint8 below 2**bits, to (..., bytes) uint8; a row ends with zeros up to a whole byte."""
    count, width = _unit(bits)
    columns = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -columns % count)).unflatten(-1, (-1, count))
    word = (padded.to(_word(width)) << _shifts(count, bits, codes.device)).sum(-1, keepdim=True)
    stream = (word >> _shifts(width, 8, codes.device)) & 255
    return stream.to(torch.uint8).flatten(-2)[..., : row_bytes(columns, bits)].contiguous()


def unpack_codes(stream: Tensor, bits: int, columns: int) -> Tensor:
    """The (..., columns) uint8 codes of (..., bytes) uint8."""
    count, width = _unit(bits)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % width)).unflatten(-1, (-1, width))
    if width == 1:
        word = padded
    else:
        wide = padded.to(_word(width)) << _shifts(width, 8, stream.device)
        word = wide.sum(-1, keepdim=True, dtype=wide.dtype)
    codes = (word >> _shifts(count, bits, stream.device)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :columns].contiguous()


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
