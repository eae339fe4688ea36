"""Formats whose weights are multiplied as they lie, by the compiled kernel of `runtime` or by torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.runtime.build import library, why_missing
from secateur.runtime.kernel import Layout, Matrix, Path, linear
from secateur.storage.bitmask import row_offsets
from secateur.storage.low_bit_linear import low_bit_linear
from secateur.storage.packed_linear import KERNELS, PackedLinear, unpack_and_multiply

__all__ = ["COMPILED", "KERNELS", "compiled", "kernel_of", "matrix_of", "weight_bytes"]

STORED = (torch.bfloat16, torch.float16)
COMPILED = ("bitmask", "nm")
"""Formats of the compiled kernel, which is made to be faster than dense weights."""
LOW_BIT = "low-bit"
UNPACKED = "none, packed weights are unpacked for every product"


def compiled(packed: PackedLinear, inputs: Tensor) -> Tensor:
    """What an `nn.Linear` with these weights computes, up to the order of float32 sums.

    The kernel computes with the weights of the file: where a dense model would round them once more, on other
    devices, for gradients and under transformations of torch the weight is unpacked.
    """
    if not _applies(packed, inputs):
        return unpack_and_multiply(packed, inputs)
    kernel, matrix = library(), matrix_of(packed)
    if kernel is None or matrix is None:
        return unpack_and_multiply(packed, inputs)
    return linear(kernel, matrix, inputs, packed.bias)


def matrix_of(packed: PackedLinear) -> Matrix | None:
    """The weight as the kernel takes it; None for a pattern or dtype that it does not know.

    Kept with the module until its parts are others (after a move to another device and back).
    """
    known = packed.prepared
    if isinstance(known, Matrix) and known.values is packed.packed_values:
        return known
    matrix = packed.prepared = _matrix(packed, packed.parts)
    return matrix


def kernel_of(model: nn.Module) -> str | None:
    """What computes from the packed weights of a model, in a few words; None where it has none."""
    formats = sorted({module.format for module in model.modules() if isinstance(module, PackedLinear)})
    found = {format: _kernel_words(format) for format in formats}
    if len(set(found.values())) < 2:
        return next(iter(found.values()), None)
    return "; ".join(f"{format}: {words}" for format, words in found.items())


def _kernel_words(format: str) -> str:
    if format not in COMPILED:
        return "torch, from the bytes for few tokens at a time" if format == LOW_BIT else UNPACKED
    kernel = library()
    if kernel is None:
        return f"{UNPACKED}: {why_missing()}"
    names = {Path.PORTABLE: "compiled, without AVX2", Path.AVX2: "compiled, AVX2"}
    return names[Path(kernel.secateur_path())]


def weight_bytes(model: nn.Module) -> int:
    """Memory of the parameters and buffers of a model, packed or not; shared ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


def _matrix(packed: PackedLinear, parts: dict[str, Tensor]) -> Matrix | None:
    shape, values = (packed.out_features, packed.in_features), parts["values"]
    if packed.stored not in STORED:
        return None
    if packed.format == "bitmask":
        mask = parts["mask"]
        return Matrix(shape, Layout.BITMASK, mask.contiguous(), values, row_offsets(mask))
    if values.shape[1:] != (shape[1] // 4, 2) or shape[1] % 8:  # 2:4, rows of whole bytes
        return None
    offsets = torch.arange(shape[0] + 1, dtype=torch.int64) * (shape[1] // 2)
    return Matrix(shape, Layout.TWO_OF_FOUR, parts["indices"].contiguous(), values, offsets)


def _applies(packed: PackedLinear, inputs: Tensor) -> bool:
    weight, dtype = packed.weight, inputs.dtype
    return (
        weight.is_cpu
        and inputs.is_cpu
        and dtype == weight.dtype
        and (dtype == torch.float32 or dtype == packed.stored)
        and not (torch.is_grad_enabled() and _needs_gradients(packed, inputs))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(inputs) in (Tensor, nn.Parameter)
    )


def _needs_gradients(packed: PackedLinear, inputs: Tensor) -> bool:
    return inputs.requires_grad or (packed.bias is not None and packed.bias.requires_grad)


KERNELS.update({**dict.fromkeys(COMPILED, compiled), LOW_BIT: low_bit_linear})
