"""Products with a matrix of a few bits, from its bytes: no weight is formed.

A code is a sum of bits, each worth a power of two. So what a byte of a row adds to the product with a vector
depends on that byte alone: its 256 possible sums are computed once for all rows, each row looks its own up,
and those of a group are scaled together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from secateur.quantise.low_bit import low_of

__all__ = ["byte_products", "in_bytes"]

PIECE = 1 << 18
"""Bytes whose sums are looked up at a time, so that what is needed besides stays in the cache."""
BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)
"""(256, 8), the least bit first."""
POWERS = np.exp2(np.arange(8, dtype=np.float32))


def in_bytes(parts: Mapping[str, Tensor]) -> bool:
    """Whether no byte belongs to two groups."""
    bits, group = parts["layout"].tolist()
    return bool(parts["scale"].shape[1] == 1 or group * bits % 8 == 0)


def byte_products(parts: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """(tokens, outputs) float32 of (tokens, inputs) float32, on the CPU.

    Args:
        parts: as of `low_bit.parts_of`, of which `in_bytes` holds.
    """
    bits, group = parts["layout"].tolist()
    scale, (rows, stream) = parts["scale"].float(), parts["codes"].shape
    weights = _bit_weights(inputs, bits, stream)
    found = _group_sums(inputs, group, scale.shape[1]) @ low_of(parts).T
    patterns = torch.from_numpy(BITS).T
    for groups, part in _pieces(rows, stream, bits, group, inputs.shape[1]):
        codes = parts["codes"][:, part]
        first = torch.arange(0, 256 * codes.shape[1], 256, dtype=torch.int32)
        index = codes.int().add_(first).flatten()
        for own, weight in zip(found, weights, strict=True):
            sums = (weight[part] @ patterns).flatten().index_select(0, index)
            grouped = sums.view(rows, groups.stop - groups.start, -1).sum(-1)
            own.add_(grouped.mul_(scale[:, groups]).sum(-1))
    return found


def _bit_weights(inputs: Tensor, bits: int, stream: int) -> Tensor:
    """(tokens, bytes, 8): what each bit of a row is worth; those that fill it up are worth nothing."""
    flat = (inputs[:, :, None] * torch.from_numpy(POWERS[:bits])).flatten(1)
    return _filled(flat, 8 * stream).view(len(inputs), stream, 8)


def _group_sums(inputs: Tensor, group: int, groups: int) -> Tensor:
    """(tokens, groups) of (tokens, inputs)."""
    return _filled(inputs, groups * group).view(len(inputs), groups, group).sum(-1)


def _filled(rows: Tensor, columns: int) -> Tensor:
    """With zeros up to so many columns."""
    missing = columns - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _pieces(rows: int, stream: int, bits: int, group: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Groups of one width and their bytes: the whole ones, some at a time, then what is left of a row."""
    whole, width = columns // group, group * bits // 8
    step = max(1, PIECE // max(rows * width, 1))
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield slice(start, stop), slice(start * width, stop * width if stop * group < columns else stream)
    if columns > whole * group:
        yield slice(whole, whole + 1), slice(whole * width, stream)
