"""Random matrices with zeros, packed as the kernel takes them."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from secateur.checkpoint.packing import Packed
from secateur.runtime.build import library, why_missing
from secateur.runtime.compiled import matrix_of
from secateur.runtime.kernel import Matrix, Path, multiply, tiles
from secateur.runtime.packed_linear import PackedLinear


def kernel_or_skip() -> ctypes.CDLL:
    """The kernel, built once a user and shared by all tests."""
    found = library()
    if found is None:
        pytest.skip(why_missing() or "no kernel")
    return found


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Zeros anywhere; an empty and a full row where there are rows enough."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    if rows > 4 and 0 < sparsity < 1:
        weight[1] = 0
        weight[3] = torch.randn(columns, generator=generator)
    return weight.to(dtype)


def two_of_four(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, columns // 4, 4, generator=generator)
    keep = torch.rand(groups.shape, generator=generator).argsort(-1) < 2
    return groups.masked_fill(~keep, 0).view(rows, columns).to(dtype)


def linear_of(weight: Tensor, format: str = "bitmask", dtype: torch.dtype | None = None) -> PackedLinear:
    return PackedLinear(Packed.of(weight, format), torch.empty(0, dtype=dtype or weight.dtype))


def packed(weight: Tensor, format: str = "bitmask") -> Matrix:
    layer = linear_of(weight, format)
    matrix = matrix_of(layer, format, layer.parts)
    assert matrix is not None
    return matrix


def whole(
    kernel: ctypes.CDLL, matrix: Matrix, path: Path | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """All tiles as one matrix."""
    return torch.cat([tile.clone() for _, tile in tiles(kernel, matrix, dtype, path)])


def check_path(
    kernel: ctypes.CDLL, weight: Tensor, matrix: Matrix, rows: int, path: Path, seed: int = 0
) -> None:
    """Float32 sums of exact products, of x in float32 and bfloat16: a bound on their rounding, far below that
    of bfloat16. Tiles are the weight, bit for bit, in its dtype and in float32."""
    wide = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    for x in (wide, wide.bfloat16()):
        expected = x.double() @ weight.double().T
        bound = 1e-6 * (x.double().abs() @ weight.double().abs().T) + 1e-12
        assert ((multiply(kernel, matrix, x, path) - expected).abs() <= bound).all(), (path, x.dtype)
    assert whole(kernel, matrix, path).view(torch.int16).equal(weight.view(torch.int16)), path
    wide = whole(kernel, matrix, path, torch.float32)
    assert wide.view(torch.int32).equal(weight.float().view(torch.int32)), path


def fenced(matrix: Matrix) -> Matrix:
    """The same, with codes and values at the end of memory that may be read: one byte more is a crash."""
    return replace(matrix, codes=_fenced(matrix.codes), values=_fenced(matrix.values))


def _fenced(tensor: Tensor) -> Tensor:
    whole = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + whole), mmap.PAGESIZE, 0) == 0
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=whole - tensor.nbytes)
    return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)
