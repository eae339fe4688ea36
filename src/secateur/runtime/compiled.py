"""Products with the compiled kernel, of packed layers whose weights it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secateur.runtime.build import library
from secateur.runtime.kernel import Layout, Matrix, linear
from secateur.runtime.packed_linear import PackedLinear, same_numbers, unpack_and_multiply
from secateur.storage.bitmask import row_offsets

__all__ = ["MATRICES", "STORED", "compiled", "matrix_of", "product", "two_of_four"]

STORED = (torch.bfloat16, torch.float16)
AsMatrix = Callable[[Mapping[str, Tensor], tuple[int, int]], Matrix | None]


def compiled(packed: PackedLinear, inputs: Tensor) -> Tensor:
    """What an `nn.Linear` with these weights computes, up to the order of float32 sums.

    The kernel computes with the weights of the file: where a dense model would round them once more, on other
    devices, for gradients and under transformations of torch the weight is unpacked.
    """
    found = product(packed, packed.format, packed.parts, inputs, packed.bias)
    return unpack_and_multiply(packed, inputs) if found is None else found


def product(
    packed: PackedLinear, format: str, parts: Mapping[str, Tensor], inputs: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """inputs W^T (+ bias) from the parts of a matrix W of the shape of the layer, which may be all of its
    weight or one of its factors; None where the kernel does not compute and W must be unpacked."""
    if not _applies(packed, inputs):
        return None
    kernel = library()
    matrix = None if kernel is None else matrix_of(packed, format, parts)
    return None if kernel is None or matrix is None else linear(kernel, matrix, inputs, bias)


def matrix_of(packed: PackedLinear, format: str, parts: Mapping[str, Tensor]) -> Matrix | None:
    """The parts of a matrix as the kernel takes them; None for a pattern or dtype that it does not know.

    Kept with the module until its parts are others.
    """
    known = packed.prepared
    if isinstance(known, Matrix) and known.values is parts["values"]:
        return known
    if packed.stored not in STORED or format not in MATRICES:
        return None
    matrix = packed.prepared = MATRICES[format](parts, (packed.out_features, packed.in_features))
    return matrix


def _from_bitmask(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Matrix:
    mask = parts["mask"]
    return Matrix(shape, Layout.BITMASK, mask.contiguous(), parts["values"].contiguous(), row_offsets(mask))


def _from_groups(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Matrix | None:
    rows, columns = shape
    if not two_of_four(parts["values"].shape, columns):
        return None
    offsets = torch.arange(rows + 1, dtype=torch.int64) * (columns // 2)
    return Matrix(
        shape, Layout.TWO_OF_FOUR, parts["indices"].contiguous(), parts["values"].contiguous(), offsets
    )


MATRICES: dict[str, AsMatrix] = {"bitmask": _from_bitmask, "nm": _from_groups}
"""By format: its parts as a matrix of the kernel, which shares their memory. With `compiled` in `KERNELS`
that is all that a format needs to be computed with; `product` serves formats of several factors."""


def two_of_four(values: tuple[int, ...], columns: int) -> bool:
    """By the shape of the values; rows are of whole bytes."""
    return tuple(values[1:]) == (columns // 4, 2) and columns % 8 == 0


def _applies(packed: PackedLinear, inputs: Tensor) -> bool:
    known = inputs.dtype == torch.float32 or inputs.dtype == packed.stored
    return inputs.is_cpu and known and same_numbers(packed, inputs)
