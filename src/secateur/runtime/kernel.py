"""Products with packed matrices on a CPU: what `kernel.cpp` computes, on tensors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError

__all__ = [
    "HIGHEST",
    "MOST_ROWS",
    "Layout",
    "Matrix",
    "Path",
    "highest_path",
    "linear",
    "multiply",
    "path_of",
    "tiles",
]

HIGHEST = "SECATEUR_KERNEL"
"""Environment variable that names the highest path to take (`avx2`): to compare them, or to avoid one."""

MOST_ROWS = 32
"""With more rows of x, unpacking and the ordinary product take less time (measured with AVX2)."""
TILE, TILE_ROWS = 1 << 20, 256
"""Elements that are unpacked at once, so that they stay in the cache until they are used, unless they are
fewer rows than these, with which torch's product is slow."""
ALONE = 1 << 16
"""Elements below which waking other threads takes longer than the work."""


class Layout(IntEnum):
    """What a byte of codes says of 8 columns: see `kernel.cpp`."""

    BITMASK = 0
    TWO_OF_FOUR = 1


class Path(IntEnum):
    """Which instructions are used; a processor with one has all before it.

    `AVX512` needs BW, VL and VBMI2; `AVX512_BF16` multiplies bfloat16 by bfloat16 without widening them.
    """

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3

    @property
    def label(self) -> str:
        """As people write it: `avx512-bf16`."""
        return self.name.lower().replace("_", "-")


ARITHMETIC = {Path.AVX512_BF16: torch.bfloat16}
"""Dtypes of 16 bits that processors compute in: elsewhere torch's products in them take several times as long
as those in float32."""


def path_of(kernel: ctypes.CDLL) -> Path:
    """The best path of this processor, or that of `$SECATEUR_KERNEL` if it is lower.

    Raises:
        InputError: the variable names no path.
    """
    return min(Path(kernel.secateur_path()), highest_path())


def highest_path() -> Path:
    """What `$SECATEUR_KERNEL` allows; all where it is not set. Raises `InputError`: it names no path."""
    asked = os.environ.get(HIGHEST)
    if not asked:
        return Path.AVX512_BF16
    labels = {path.label: path for path in Path}
    if asked not in labels:
        raise InputError(f"{HIGHEST}={asked}", f"one of {', '.join(labels)}")
    return labels[asked]


@dataclass(frozen=True)
class Matrix:
    """A packed matrix on the CPU, all parts contiguous.

    Attributes:
        shape: (rows, columns).
        codes: uint8, ceil(columns / 8) of each row.
        values: (stored,) bfloat16 or float16, row after row.
        offsets: (rows + 1,) int64, where each row begins in `values`, and the end.
    """

    shape: tuple[int, int]
    layout: Layout
    codes: Tensor
    values: Tensor
    offsets: Tensor

    def arguments(self) -> tuple[int, int, int, int, int, int]:
        """The first arguments of all functions of the kernel."""
        pointers = self.codes.data_ptr(), self.values.data_ptr(), self.offsets.data_ptr()
        return (*self.shape, *pointers, int(self.layout))


def linear(kernel: ctypes.CDLL, matrix: Matrix, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
    """What an `nn.Linear` with this weight computes: (..., columns) -> (..., rows), in the dtype of `inputs`.

    Few rows are computed from the packed weight, which is read once for every 8 of them, with float32 sums
    that are rounded once. For more the weight is unpacked tile by tile and the products are those of torch.
    """
    flat = inputs.reshape(-1, matrix.shape[1])
    if flat.shape[0] <= MOST_ROWS:
        sums = multiply(kernel, matrix, flat)
        outputs = (sums if bias is None else sums.add_(bias)).to(inputs.dtype)
    else:
        outputs = _by_tiles(kernel, matrix, flat, bias)
    return outputs.view(*inputs.shape[:-1], matrix.shape[0])


def _by_tiles(kernel: ctypes.CDLL, matrix: Matrix, inputs: Tensor, bias: Tensor | None) -> Tensor:
    outputs = inputs.new_empty((len(inputs), matrix.shape[0]))
    dtype = inputs.dtype if ARITHMETIC.get(kernel.secateur_path()) == inputs.dtype else torch.float32
    x, bias = inputs.to(dtype), None if bias is None else bias.to(dtype)
    for first, tile in tiles(kernel, matrix, dtype):
        part = slice(first, first + len(tile))
        outputs[:, part] = nn.functional.linear(x, tile, None if bias is None else bias[part])
    return outputs


def multiply(kernel: ctypes.CDLL, matrix: Matrix, inputs: Tensor, path: Path | None = None) -> Tensor:
    """(batch, columns) of any floating dtype -> (batch, rows) float32, with float32 sums."""
    x = inputs.to(torch.float32).contiguous()
    outputs = x.new_empty((len(x), matrix.shape[0]))
    half, narrow = matrix.values.dtype == torch.float16, inputs.dtype == torch.bfloat16
    kernel.secateur_multiply(
        *matrix.arguments(), half, narrow, x.data_ptr(), len(x), outputs.data_ptr(), _threads(matrix),
        path_of(kernel) if path is None else path,
    )  # fmt: skip
    return outputs


def tiles(
    kernel: ctypes.CDLL, matrix: Matrix, dtype: torch.dtype | None = None, path: Path | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The matrix as it was before packing, some rows at a time: the first of them, and (some, columns).

    All tiles are the same memory: use one before asking for the next.

    Args:
        dtype: float32, or that of the matrix.
    """
    path = path_of(kernel) if path is None else path
    rows, columns = matrix.shape
    stored = matrix.values.dtype
    half, wide = stored == torch.float16, dtype not in (None, stored)
    some = min(max(TILE // max(columns, 1), TILE_ROWS), rows)
    tile = matrix.values.new_empty((some, columns), dtype=torch.float32 if wide else stored)
    for first in range(0, rows, some):
        last = min(first + some, rows)
        kernel.secateur_unpack(
            *matrix.arguments(), half, first, last, tile.data_ptr(), wide, _threads(matrix), path
        )
        yield first, tile[: last - first]


def _threads(matrix: Matrix) -> int:
    return torch.get_num_threads() if matrix.shape[0] * matrix.shape[1] >= ALONE else 1
